"""Guidance: what pulls samples towards a class, or away from a blunted copy of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .backend import Branches, Labels
from .bundle import ModelShape
from .errors import InputError
from .fields import check_field, is_number, told

_SCALES = "0 (none) or a positive number, 1 to 3 is usual"


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance (arXiv 2412.06329): (1 + scale) * conditional - scale * unconditional.

    ``what`` names the parts guided: "a" (log_scale), "b" (shift) or "ab". ``annealed`` lets the scale grow linearly
    along the sequence. ``attention_temperature`` divides the attention logits of the unconditional branch only; it
    is what guides an unconditional model. Raises InputError for values that make no guidance.
    """

    scale: float = 0.0
    what: str = "ab"
    annealed: bool = False
    attention_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_field("scale", self.scale, "a number")
        check_field("what", self.what, "a string")
        check_field("annealed", self.annealed, "True or False")
        check_field("attention_temperature", self.attention_temperature, "a number")
        if not 0 <= self.scale < math.inf:
            raise InputError.of("scale", self.scale, _SCALES)
        if self.what not in ("a", "b", "ab"):
            raise InputError.of("what", f"'{self.what}'", "ab, a (log_scale) or b (shift)")
        if not 0 < self.attention_temperature < math.inf:
            raise InputError.of("attention_temperature", self.attention_temperature, "a positive number")

    @classmethod
    def of(cls, said: Guidance | float | None) -> Guidance:
        """A guidance, or the one of this scale; None is none. Raises InputError for what is neither."""
        if said is None or isinstance(said, Guidance):
            return said or cls()
        if not is_number(said):
            raise InputError.of("guidance", told(said), "a Guidance, or a number: its scale")
        if not 0 <= said < math.inf:
            raise InputError.of("guidance", said, _SCALES)
        return cls(said)

    def branches(self, tokens: int, classes: Labels) -> Branches:
        """The branches that draw samples of ``classes`` (B,), below 0 for the null class; ``tokens`` is T."""
        if not self.scale:
            return Branches.plain(classes, tokens)
        ramp = np.arange(1, tokens + 1) / max(tokens - 1, 1) if self.annealed else np.ones(tokens)
        scale = np.stack([self.scale * ramp * (part in self.what) for part in "ab"])  # (2, T)
        return Branches(
            labels=np.stack([classes, np.full_like(classes, -1)]),
            mix=np.stack([1 + scale, -scale], 1).astype(np.float32),
            inverse_temperature=np.array([1, 1 / self.attention_temperature], np.float32),
        )

    def check(self, config: ModelShape, classes: Labels) -> None:
        """Raise InputError if it does nothing for samples of these classes, below 0 for the null class."""
        if not self.scale and self.attention_temperature != 1:
            raise InputError(
                f"`attention_temperature` {self.attention_temperature:g} does nothing without guidance; give a `scale` "
                "above 0 too",
                field="attention_temperature",
                found=self.attention_temperature,
                expected="1 without guidance",
            )
        if self.scale and self.what == "a" and not config.nvp:
            message = "a volume-preserving model has no log_scale, so guiding 'a' does nothing; guide 'b'"
            raise InputError(message, field="what", found="a", expected="b or ab")
        if self.scale and self.attention_temperature == 1 and (classes < 0).all():
            kind = "samples without a label" if config.classes else "an unconditional model"
            cure = "give `labels`, or " if config.classes else ""
            raise InputError(
                f"guidance {self.scale:g} does nothing for {kind} at attention temperature 1: both branches are the "
                f"same, at twice the cost; {cure}pass an `attention_temperature` other than 1, or guidance 0",
                field="guidance",
                found=self.scale,
                expected=f"0 for {kind}",
            )
