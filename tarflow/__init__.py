"""TarFlow normalizing flows, from PyTorch checkpoints to production (arXiv 2412.06329)."""
