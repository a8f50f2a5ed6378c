"""TensorRT engines from the graphs of a bundle. Nothing here imports PyTorch."""
