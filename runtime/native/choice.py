"""Whether provider "auto" takes the native engine for a bundle. The rule of speed is the library's, for C++ too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..bundle import Bundle
from ..errors import MachineError, TarflowError, briefly
from ..opening import Opening
from . import library


def why_not(bundle: Bundle, opening: Opening) -> str | None:
    """Why provider "auto" leaves this bundle to ONNX Runtime, in a few words; None where it takes the native engine.

    Nothing of it depends on what is drawn: engine and precision are settled when a bundle is opened. docs/NATIVE.md,
    "What auto takes", has the rule. Raises InputError if TARFLOW_ISA names what is not here.
    """
    exported = bundle.manifest.precision
    precision = opening.weights_in(exported)
    if exported == "bf16":
        return "its certificate needs bf16 products, which ONNX Runtime has not got on CPUs"
    try:
        slower = library.slower()
    except MachineError as error:
        return briefly(error)
    if slower is not None:
        return slower
    if precision == "int8" and not vouched(bundle.manifest.parity, precision):
        return "the bundle's parity card has no row within tolerance for native int8; an export writes one"
    return None


def on_cpus(bundle: Bundle) -> str:
    """What decodes a bundle here where there is no GPU, and if it is not the native engine, why; for people."""
    try:
        why = why_not(bundle, Opening())
        native = f"native {Opening().weights_in(bundle.manifest.precision)} ({library.isa()})" if why is None else ""
    except TarflowError as error:
        return f"nothing: {briefly(error)}"
    return native or f"ONNX Runtime; not native: {why}"


def vouched(card: Mapping[str, Any], precision: str) -> bool:
    """Whether a parity card, as a manifest has it, found native decoding in this precision within its tolerance."""
    try:
        row, limit = card["native"][precision], card["native"][precision]["tolerance"]
        return bool(row["rms"] <= limit["rms"] and row.get("certificate", 0.0) <= limit["certificate"])
    except (KeyError, TypeError, AttributeError):
        return False
