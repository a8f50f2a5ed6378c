"""The road in: bundles become images, with numpy and one engine; no PyTorch, no onnx."""
