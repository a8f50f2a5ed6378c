"""Other ways to sample, to be measured against: what is published, and what PyTorch's compiler makes of a static cache.

Both are our own words for them, on our own model's weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .model import Block, TarFlow

GrowingCache = list[tuple[Tensor, Tensor]]


@torch.inference_mode()
def published(model: TarFlow, noise: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
    """Noise (B, T, D) -> raw patches (B, T, D): eager PyTorch, a cache that grows by concatenation, and a second full
    pass for guidance (the published method).
    """
    x = noise * model.prior.sqrt()
    for block in reversed(model.blocks):
        x = _published_block(block, x, labels, guidance)
    return x


def _published_block(block: Block, z: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
    x = block.order(z).clone()
    positions = block.order(block.pos_embed, 0)
    conditional: list[GrowingCache] = [[] for _ in block.layers]
    unconditional: list[GrowingCache] = [[] for _ in block.layers]
    for i in range(x.shape[1] - 1):
        log_scale, shift = _growing_step(block, x[:, i : i + 1], positions[i], labels, conditional)
        if guidance > 0:
            null_log_scale, null_shift = _growing_step(block, x[:, i : i + 1], positions[i], None, unconditional)
            log_scale = log_scale + guidance * (log_scale - null_log_scale)
            shift = shift + guidance * (shift - null_shift)
        x[:, i + 1] = x[:, i + 1] * log_scale[:, 0].exp() + shift[:, 0]
    return block.order(x)


def _growing_step(
    block: Block, x: Tensor, position: Tensor, labels: Tensor | None, caches: list[GrowingCache]
) -> tuple[Tensor, Tensor]:
    h = block.embed(x, labels) + position
    for layer, cache in zip(block.layers, caches, strict=True):
        query, key, value = layer.attention.split(h)
        cache.append((key, value))
        keys, values = (torch.cat(parts, 2) for parts in zip(*cache, strict=True))
        h = h + layer.attention.merge(F.scaled_dot_product_attention(query, keys, values))
        h = h + layer.mlp(h)
    return block.read_out(h)


class Compiled:
    """A step on a cache of full length, position as a tensor, compiled once for all positions of a block.

    Guidance runs both branches as one batch. Compiling takes a minute a block and batch size, at first use.
    """

    def __init__(self, model: TarFlow) -> None:
        self.model = model
        self.steps = [torch.compile(_static_step, dynamic=False) for _ in model.blocks]

    @torch.inference_mode()
    def __call__(self, noise: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
        """Noise (B, T, D) -> raw patches (B, T, D)."""
        config, x = self.model.config, noise * self.model.prior.sqrt()
        rows = len(x) * (2 if guidance > 0 else 1)
        shape = (config.layers, 2, rows, config.width // config.head_dim, config.tokens, config.head_dim)
        cache = torch.zeros(shape, dtype=x.dtype)
        doubled = labels
        if guidance > 0 and labels is not None:
            doubled = torch.cat([labels, torch.full_like(labels, -1)])
        places = torch.arange(config.tokens)
        for block, step in zip(reversed(self.model.blocks), reversed(self.steps), strict=True):
            z = block.order(x)
            x, positions = z.clone(), block.order(block.pos_embed, 0)
            for i in range(config.tokens - 1):
                at = places[i : i + 1]
                patch = x[:, i : i + 1].repeat(2, 1, 1) if guidance > 0 else x[:, i : i + 1].clone()
                log_scale, shift = step(block, patch, positions[i : i + 1].clone(), doubled, cache, at)
                if guidance > 0:
                    log_scale, shift = (
                        part[: len(x)] * (1 + guidance) - part[len(x) :] * guidance for part in (log_scale, shift)
                    )
                x[:, i + 1] = x[:, i + 1] * log_scale[:, 0].exp() + shift[:, 0]
            x = block.order(x)
        return x


def _static_step(
    block: Block, x: Tensor, place: Tensor, labels: Tensor | None, cache: Tensor, at: Tensor
) -> tuple[Tensor, Tensor]:
    h = block.embed(x, labels) + place
    seen = (torch.arange(cache.shape[4]) <= at).unsqueeze(0)  # (1, T)
    for j, layer in enumerate(block.layers):
        query, key, value = layer.attention.split(h)
        cache[j, 0].index_copy_(2, at, key)
        cache[j, 1].index_copy_(2, at, value)
        h = h + layer.attention.merge(F.scaled_dot_product_attention(query, cache[j, 0], cache[j, 1], attn_mask=seen))
        h = h + layer.mlp(h)
    return block.read_out(h)
