"""The published sampling method, as the rival to measure: eager PyTorch, a cache that grows by concatenation, and a
second full pass for guidance. Our own words for it, on our own model's weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tarflow.model import Block, TarFlow

GrowingCache = list[tuple[Tensor, Tensor]]


@torch.inference_mode()
def decode(model: TarFlow, noise: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
    """Noise (B, T, D) -> raw patches (B, T, D)."""
    x = noise * model.prior.sqrt()
    for block in reversed(model.blocks):
        x = _decode_block(block, x, labels, guidance)
    return x


def _decode_block(block: Block, z: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
    x = block.order(z).clone()
    positions = block.order(block.pos_embed, 0)
    conditional: list[GrowingCache] = [[] for _ in block.layers]
    unconditional: list[GrowingCache] = [[] for _ in block.layers]
    for i in range(x.shape[1] - 1):
        log_scale, shift = _step(block, x[:, i : i + 1], positions[i], labels, conditional)
        if guidance > 0:
            null_log_scale, null_shift = _step(block, x[:, i : i + 1], positions[i], None, unconditional)
            log_scale = log_scale + guidance * (log_scale - null_log_scale)
            shift = shift + guidance * (shift - null_shift)
        x[:, i + 1] = x[:, i + 1] * log_scale[:, 0].exp() + shift[:, 0]
    return block.order(x)


def _step(
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
