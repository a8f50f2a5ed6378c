"""What a precision is: one row a precision, for every room. What a graph keeps in it: FORMAT.md, "Precision"."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a bundle may be from PyTorch: rms of patches and samples, shift of bits/dim, round-trip error."""

    rms: float
    bits_per_dim: float
    certificate: float


@dataclass(frozen=True, slots=True)
class Precision:
    """``type`` is that of matrix products, attention and the cache, as PyTorch spells it; the rest is float32.

    ``storage`` holds it in numpy (which has no bfloat16), ``onnx`` and ``tensorrt`` are their names for it; no
    ``tensorrt``, no engines. With ``int8`` the products' weights are stored as int8. ``tolerance`` is about ten times
    what is measured on trained models, ``wider`` what to try for a model that exceeds it. ``fused`` says that ONNX
    Runtime's CUDA provider has operators of its own for it, which an export writes graphs of.
    """

    name: str
    type: str
    storage: str
    onnx: int
    tensorrt: str | None
    tolerance: Tolerance
    wider: str = "fp32"
    int8: bool = False
    fused: bool = False

    @property
    def cache_bytes(self) -> int:
        """Of one number in the KV cache."""
        return 4 if self.storage == "float32" else 2


PRECISIONS = {
    row.name: row
    for row in (
        Precision("fp32", "float32", "float32", 1, "FLOAT", Tolerance(1e-4, 1e-4, 1e-2)),
        Precision("fp16", "float16", "float16", 10, "HALF", Tolerance(5e-3, 5e-3, 0.5), "bf16 or fp32", fused=True),
        Precision("bf16", "bfloat16", "uint16", 16, "BF16", Tolerance(5e-2, 5e-2, 5.0)),
        Precision("int8", "float32", "float32", 1, None, Tolerance(5e-2, 5e-2, 5.0), "fp16 or fp32", int8=True),
    )
}
_INT16 = Tolerance(1e-3, 1e-4, 0.1)  # a precision of the native engine's alone
ENGINE_PRECISIONS = {row.tensorrt: row.name for row in PRECISIONS.values() if row.tensorrt is not None}


def native_tolerance(exported: str, precision: str) -> Tolerance:
    """How far the native engine may be off in a precision, of a bundle that was ``exported`` in one: in each the wider
    of both, as it works on the bundle's weights, and its samples are encoded in the bundle's.
    """
    own, theirs = PRECISIONS[exported].tolerance, _INT16 if precision == "int16" else PRECISIONS[precision].tolerance
    wider = {name: max(getattr(own, name), getattr(theirs, name)) for name in Tolerance.__slots__}
    return Tolerance(**wider)
