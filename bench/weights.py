"""Models with random weights: serial decoding does the same work whatever the weights are."""

from __future__ import annotations

import torch

from tarflow.config import Config
from tarflow.model import TarFlow


def random_model(config: Config) -> TarFlow:
    """Random, well-conditioned weights; the output layer too, which a fresh model has at zero."""
    torch.manual_seed(0)
    model = TarFlow(config)
    for block in model.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.2 * config.width**-0.5)
    return model.eval()
