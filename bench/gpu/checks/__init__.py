"""What only a device can show of the runtime on ONNX Runtime, and what must hold there as it does on a CPU."""
