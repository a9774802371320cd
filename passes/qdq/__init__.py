"""The lowering of integer operators to quantize, dequantize and matmul, as ONNX and compilers read it.

Nothing here writes a file.
"""
