"""Write ``weights.safetensors``: every tensor once, streamed, at offsets the graphs can point to."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from tarflow.checkpoint import CONFIG_KEY, DERIVED, SCALE, CheckpointError, reference_name, reference_state
from tarflow.model import TarFlow

from ..runtime.errors import InputError
from ..runtime.precision import Precision
from .graphs import BlockGraph
from .precision import torch_type
from .quantise import candidates, quantise

_ALIGNMENT = 4096  # of the first tensor: a page, so that mapping the file keeps tensors aligned
_TYPES = {
    torch.float32: ("F32", ir.DataType.FLOAT),
    torch.float16: ("F16", ir.DataType.FLOAT16),
    torch.bfloat16: ("BF16", ir.DataType.BFLOAT16),
    torch.int8: ("I8", ir.DataType.INT8),
}


def rename(module: BlockGraph, block: int) -> dict[str, str]:
    """Names a graph gives its weights -> names of block ``block``'s tensors in the weights file."""
    names = {name: reference_name(f"blocks.{block}.{name.removeprefix('block.')}") for name in module.state_dict()}
    return names | {"class_table": f"{DERIVED}blocks.{block}.class_table"}


def weights_size(model: TarFlow, precision: Precision) -> int:
    """Bytes of all tensors, without the header; with int8, if all weights take it."""
    int8 = candidates(model) if precision.int8 else ()
    return sum(tensor.numel() * dtype.itemsize for _, tensor, dtype in _tensors(model, precision, int8))


def write_weights(
    model: TarFlow, precision: Precision, path: Path, int8: Collection[str] = frozenset()
) -> dict[str, ir.ExternalTensor]:
    """Write the file and return where each tensor lies. One tensor is converted at a time, those named in ``int8`` (as
    in a checkpoint) quantised.

    The layout is safetensors, the configuration in its metadata, so that the file is a checkpoint too. Weights are
    those :func:`check_weights` lets pass.
    """
    tensors = sorted(_tensors(model, precision, int8), key=_packing)
    header: dict[str, object] = {
        "__metadata__": {CONFIG_KEY: json.dumps(model.config.to_dict()), "tarflow.precision": precision.name}
    }
    end = 0
    for name, tensor, dtype in tensors:
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": _TYPES[dtype][0], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % _ALIGNMENT)
    stored = {}
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor, dtype in tensors:
            raw, place = _bytes(tensor, dtype), file.tell()
            stored[name] = _external(path, place, raw.nbytes, _TYPES[dtype][1], tensor.shape)
            file.write(raw)
    return stored | _class_tables(model, stored, path)


def int8_names(path: Path) -> frozenset[str]:
    """The weights that a file holds as int8."""
    with safe_open(str(path), framework="np") as file:
        return frozenset(name for name in file.keys() if file.get_slice(name).get_dtype() == "I8")  # noqa: SIM118


def _external(path: Path, start: int, length: int, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.ExternalTensor:
    """A tensor in the weights file. Graphs beside it name it as they do their own."""
    return ir.ExternalTensor(path.name, start, length, dtype, shape=ir.Shape(shape), name="", base_dir=path.parent)


def _class_tables(model: TarFlow, stored: dict[str, ir.ExternalTensor], path: Path) -> dict[str, ir.ExternalTensor]:
    """Each block's class embeddings and, right behind them in the file, the null class, read as one tensor."""
    tables = {}
    for k in range(model.config.blocks if model.config.classes else 0):
        known, null = stored[f"blocks.{k}.class_embed"], stored[f"{DERIVED}blocks.{k}.null_class"]
        start, length = known.offset or 0, known.nbytes + null.nbytes  # a header comes first: no offset is 0
        assert start + known.nbytes == null.offset
        shape = (model.config.classes + 1, model.config.width)
        tables[f"{DERIVED}blocks.{k}.class_table"] = _external(path, start, length, known.dtype, shape)
    return tables


def _tensors(model: TarFlow, precision: Precision, int8: Collection[str]) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    products = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    half = {reference_name(f"{name}.{part}") for name in products for part in ("weight", "bias")}
    for name, tensor in reference_state(model).items():
        if name in int8:
            levels, scale = quantise(tensor)
            yield name, levels, torch.int8
            yield f"{DERIVED}{name}{SCALE}", scale, torch.float32
            continue
        yield name, tensor, torch_type(precision) if name in half else torch.float32
        if name.endswith(".class_embed"):
            yield f"{DERIVED}{name.removesuffix('class_embed')}null_class", tensor.mean(0), torch.float32


def _packing(entry: tuple[str, Tensor, torch.dtype]) -> tuple[int, bool]:
    """Wide types first, odd sizes last: every tensor is aligned to its type, most to a cache line."""
    _, tensor, dtype = entry
    return -dtype.itemsize, tensor.numel() * dtype.itemsize % 64 != 0


def check_weights(model: TarFlow, precision: Precision) -> None:
    """Raises CheckpointError if a weight is not finite, InputError if it does not fit the precision."""
    for name, tensor, dtype in _tensors(model, precision, ()):
        if torch.isfinite(tensor.to(dtype)).all():
            continue
        if torch.isfinite(tensor).all():
            raise InputError(
                f"weight {name} reaches {tensor.abs().max():.3g}, more than {precision.type} can hold; use `engine` "
                f"{precision.wider}",
                field="engine",
            )
        raise CheckpointError(f"weight {name} is not finite: the checkpoint is broken, or its training diverged")


def _bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    converted = tensor.detach().cpu().to(dtype).contiguous()
    raw: NDArray[np.uint8] = converted.view(-1).view(torch.uint8).numpy()
    return raw.data
