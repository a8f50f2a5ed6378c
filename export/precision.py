"""A precision in PyTorch: which of a block's tensors are half, which stay float32.

Matmul operands, attention and the KV cache are stored and computed in the precision's type. The residual stream,
LayerNorm, softmax, GELU, exp, the affine update, guidance and the flow state stay in float32.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from tarflow.model import Block

from ..runtime.errors import InputError
from ..runtime.precision import PRECISIONS, Precision


def precision_named(engine: str) -> Precision:
    """Raises InputError for a precision that is not one of ours."""
    if engine not in PRECISIONS:
        raise InputError.of("engine", f"'{engine}'", f"one of {', '.join(PRECISIONS)}")
    return PRECISIONS[engine]


def torch_type(precision: Precision) -> torch.dtype:
    """The type of matrix products, attention and the cache."""
    found: torch.dtype = getattr(torch, precision.type)
    return found


def typed(block: Block, precision: Precision) -> Block:
    """The block with its matrix products in ``precision``; the same object in float32."""
    dtype = torch_type(precision)
    if dtype == torch.float32:
        return block
    block = copy.deepcopy(block)
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return block
