"""The road out: PyTorch checkpoints become bundles of ONNX graphs."""
