"""Decoding on TensorRT: engines, their record, the device memory they work in."""
