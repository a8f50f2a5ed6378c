"""The runtime on a GPU, also on a machine without network: what to bring, what to check, what to time."""
