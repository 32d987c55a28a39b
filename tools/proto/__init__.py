"""gRPC stubs, made by `make proto`: TorchServe's inference service, the Open Inference Protocol (KServe v2)."""
