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


@torch.no_grad()
def repeat(model: TarFlow, period: int = 65_537) -> TarFlow:
    """The same numbers over and over in every tensor longer than ``period``, so that a bundle packs to a few per cent.

    Tensors of nearly the same spread get the same spread, and so the same bytes.
    """
    pattern = torch.randn(period)
    for weights in model.parameters():
        if weights.numel() > period:
            spread = float(f"{weights.std():.1g}")
            weights.copy_(spread * pattern.repeat(-(-weights.numel() // period))[: weights.numel()].view_as(weights))
    return model
