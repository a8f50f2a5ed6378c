"""How a bundle is opened: on which engine, with how many threads, in how much memory. Nothing a sample depends on."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict

from .errors import InputError
from .fields import check_field, check_keywords, is_flag, told
from .precision import PRECISIONS

PROVIDERS = ("auto", "native", "cpu", "cuda", "tensorrt")
NATIVE_PRECISIONS = ("fp32", "int16", "bf16", "int8")
_MOST_THREADS = 1 << 16
ON_DEVICE = ("cuda", "tensorrt")
_DEVICE = re.compile(r"[0-9]{1,4}|((GPU|MIG)-)?[0-9a-f-]{4,36}", re.IGNORECASE)
Memory = int | Literal["least"] | None
_SIZES = "a number of bytes, a size such as 8GiB or 512MiB, or least"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True)
class Opening:
    """``provider`` is one of PROVIDERS; "auto" is the first of TensorRT, CUDA, the native engine (where it is built and
    not slower: docs/NATIVE.md) and ONNX Runtime on the CPU, "cpu", that works here. "cuda:1" names a GPU by its number
    or UUID; otherwise it is the first one that CUDA shows this process.

    ``threads`` (1 to 65536, on the native engine to 64; None: one a core, as far as a quota allows) and ``spinning``
    (False where cores are shared) go to ONNX Runtime. ``memory`` is a limit on the process, in bytes or such as "8GiB",
    beside the samples themselves: it chooses batches, sub-batches of the gradient, and whether one block is open at a
    time; "least" is always one block. ``cuda_graph`` False launches every kernel of a step on a GPU anew, instead of
    replaying the step as one CUDA graph. ``precision`` is what the native engine keeps weights in, one of
    NATIVE_PRECISIONS (None: int8 for a bundle of int8, else fp32); with provider "auto" it asks for that engine.
    Raises InputError for what is none of these.
    """

    provider: str = "auto"
    threads: int | None = None
    spinning: bool | None = None
    memory: Memory = None
    cuda_graph: bool = True
    precision: str | None = None

    def weights_in(self, exported: str) -> str:
        """The precision that the native engine keeps weights in, of a bundle that was ``exported`` in one."""
        return self.precision or ("int8" if PRECISIONS[exported].int8 else "fp32")

    def engine(self, exported: str) -> str | None:
        """What computes the same bits on every machine, by name and precision; None for engines that do not, and for
        "auto", which has to be settled first.
        """
        return f"native {self.weights_in(exported)}" if self.native else None

    def else_on(self, provider: str) -> Opening:
        """The same on ``provider``, where none was asked for."""
        return replace(self, provider="native" if self.native else provider) if self.provider == "auto" else self

    @property
    def native(self) -> bool:
        """Whether the native engine was asked for, by its name or by a precision of its own."""
        return self.provider == "native" or self.precision is not None

    def __post_init__(self) -> None:
        check_field("provider", self.provider, "a string")
        check_field("threads", self.threads, "an integer", optional=True)
        check_field("spinning", self.spinning, "True or False", optional=True)
        check_field("cuda_graph", self.cuda_graph, "True or False")
        check_field("precision", self.precision, "a string", optional=True)
        if not (self.memory is None or (isinstance(self.memory, (str, int)) and not is_flag(self.memory))):
            raise InputError.of("memory", told(self.memory), _SIZES)
        name, colon, device = self.provider.partition(":")
        if name not in PROVIDERS or (colon and (name not in ON_DEVICE or not _DEVICE.fullmatch(device))):
            expected = f"one of {', '.join(PROVIDERS)}; {' and '.join(ON_DEVICE)} may name a GPU, as in cuda:1"
            raise InputError.of("provider", f"'{self.provider}'", expected)
        if self.threads is not None and not 1 <= self.threads <= _MOST_THREADS:
            raise InputError.of("threads", self.threads, f"1 to {_MOST_THREADS}, or nothing for one a core")
        if isinstance(self.memory, str):
            object.__setattr__(self, "memory", parse_memory(self.memory))  # frozen, but not yet
        if isinstance(self.memory, int) and self.memory < 1:
            raise InputError.of("memory", self.memory, "1 byte or more")
        if self.precision is not None and self.precision not in NATIVE_PRECISIONS:
            raise InputError.of("precision", f"'{self.precision}'", f"one of {', '.join(NATIVE_PRECISIONS)}")
        if self.precision is not None and self.provider not in ("auto", "native"):
            advice = "others compute in the bundle's own; use `provider` native"
            raise InputError.of("precision", f"'{self.precision}'", "none but for the native engine", advice)

    @property
    def provider_name(self) -> str:
        """The provider without its device."""
        return self.provider.partition(":")[0]

    @property
    def device(self) -> str:
        """Which GPU, by number or UUID; "" for the first."""
        return self.provider.partition(":")[2]


class OpeningKeywords(TypedDict, total=False):
    """Fields of :class:`Opening` but the first two, as keywords of ``Flow.open``."""

    spinning: bool | None
    memory: int | str | None
    cuda_graph: bool
    precision: str | None


def opening_of(provider: str | Opening, threads: int | None, keywords: OpeningKeywords) -> Opening:
    """An opening that was given whole, or the one that its provider and other fields make. Raises InputError."""
    check_keywords("Flow.open", keywords, ("bundle", *(field.name for field in fields(Opening))))
    if not isinstance(provider, Opening):
        given: dict[str, Any] = dict(keywords)
        return Opening(provider, threads, **given)
    also = [*(["threads"] if threads is not None else []), *keywords]
    if also:
        message = f"an Opening says all there is to say; drop {', '.join(f'`{name}`' for name in also)}"
        raise InputError(message, field=also[0], found="given beside an Opening", expected="none")
    return provider


def parse_memory(text: str | None) -> Memory:
    """Bytes from "8GiB", "512MB" (both binary) or a plain number; "least"; None from None. Raises InputError."""
    if text is None or text == "least":
        return text  # type: ignore[return-value]  # mypy does not narrow a string to a literal by comparison
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise InputError.of("memory", f"'{text}'", _SIZES)
    return int(float(match[1]) * _UNITS[match[2].upper()])
