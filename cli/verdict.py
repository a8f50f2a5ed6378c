"""What a command that drew says of samples that are not as they should be, and how it then ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from typer import Exit, Option

from .console import few, say

Strict = Annotated[
    bool, Option("--strict", help="End with 1 for suspect round trips too, not just for broken samples.")
]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of ``n`` samples, by index: ``nonfinite``; ``uncertified``, which are finite and overflow when encoded again; and
    ``suspects``, whose round-trip error is above ``limit`` or not finite. ``cure`` is for those that are not finite.
    """

    n: int
    nonfinite: Sequence[int]
    uncertified: Sequence[int]
    suspects: Sequence[int]
    limit: float
    cure: str

    def tell(self, strict: bool) -> None:
        """Say what is wrong, if anything is. Raises Exit with 1 if a check failed, ``strict`` counts suspects too."""
        broken = {*self.nonfinite, *self.uncertified}
        doubtful = [i for i in self.suspects if i not in broken]
        if self.nonfinite:
            say(f"tarflow: check failed: {self._some(self.nonfinite)} are not finite. {self.cure}")
        if self.uncertified:
            what = "are finite, but overflow when they are encoded again"
            say(f"tarflow: check failed: {self._some(self.uncertified)} {what}. Lower the guidance")
        if doubtful:
            what = f"have a round-trip error above {self.limit:g}"
            cure = "Decode them serially, in a higher precision, or with less guidance"
            say(f"tarflow: {'check failed' if strict else 'suspect'}: {self._some(doubtful)} {what}. {cure}")
        if broken or (strict and doubtful):
            raise Exit(1)

    def _some(self, indices: Sequence[int]) -> str:
        return f"{len(indices)} of {self.n} samples ({few(indices)})"


def round_trip_text(largest: float | None) -> str:
    """The largest round-trip error of samples that have one, for people; None is that of none."""
    return "no sample has a finite round-trip error" if largest is None else f"round-trip error {largest:.2g} at most"
