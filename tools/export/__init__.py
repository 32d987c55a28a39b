"""Networks in the files of other engines, and the proof that they answer as torch does in fp32.

weights -> torch, fp32 -> ONNX -> OpenVINO -> int8     each -> compared with the first on real pictures
                       -> AOTInductor
"""
