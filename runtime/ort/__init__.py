"""Decoding on ONNX Runtime: sessions, the cache on the host or on the device."""
