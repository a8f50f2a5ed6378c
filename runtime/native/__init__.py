"""Decoding on CPUs by a compiled library of our own: the same bits whatever the batch, the threads or the processor."""
