import functools

try:
    from torch.onnx._internal.exporter._registration import ONNXRegistry
except ImportError:
    ONNXRegistry = None

if ONNXRegistry is not None:
    # The same table for every file: making it takes a second.
    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
