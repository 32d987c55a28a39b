"""KServe v2 (Open Inference Protocol): six calls, over REST and gRPC, with pictures or tensors.

REST -> codec -> calls -> Backend     gRPC -> codec -> calls -> Backend

https://github.com/kserve/open-inference-protocol, and its binary tensors:
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""
