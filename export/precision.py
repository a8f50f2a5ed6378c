"""Where precision is decided, once: which tensors are half, which stay float32.

Matmul operands, attention and the KV cache are stored and computed in the precision's type. The residual stream,
LayerNorm, softmax, GELU, exp, the affine update, guidance and the flow state stay in float32.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from tarflow.model import Block


@dataclass(frozen=True, slots=True)
class Precision:
    """A precision's name and the type it gives matrix products, attention and the cache.

    ``int8``: the products' weights are stored as int8, see :mod:`.quantise`; all else is in ``dtype``.
    """

    name: str
    dtype: torch.dtype
    int8: bool = False


PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp32", torch.float32),
        Precision("fp16", torch.float16),
        Precision("bf16", torch.bfloat16),
        Precision("int8", torch.float32, int8=True),
    )
}


def half_names(block: Block) -> set[str]:
    """Names, within a block, of the parameters stored in the precision's type: every matrix product's."""
    return {
        f"{name}.{part}"
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
        for part in ("weight", "bias")
    }


def typed(block: Block, precision: Precision) -> Block:
    """The block with its matrix products in ``precision``; the same object in float32."""
    if precision.dtype == torch.float32:
        return block
    block = copy.deepcopy(block)
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.to(precision.dtype)
    return block
