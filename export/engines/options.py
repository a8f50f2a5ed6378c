"""What engines are built for: batches, windows, devices. Checked before anything is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...runtime.bundle import Bundle, ModelShape
from ...runtime.errors import InputError
from ...runtime.files import size_text
from ...runtime.memory import USUAL, cache_row, forward_row, gradient_row
from ...runtime.tensorrt.record import Profile, Range

_LARGEST_GPU = 288 << 30  # bytes of the memory of any GPU there is
_LARGEST_TENSOR = 2**31 - 1  # numbers in a tensor of TensorRT's


@dataclass(frozen=True, slots=True)
class Options:
    """What to build. ``device`` None is the GPU here; else compute capabilities such as ("8.6", "8.9").

    ``batch`` and ``window`` are (least, best, most). ``level`` is TensorRT's optimisation level, 0 to 5; timings are
    read from ``timing_cache``, and kept there.
    """

    batch: Range = (1, 8, 32)
    window: Range = (1, 1, 1)
    device: tuple[str, ...] | None = None
    timing_cache: Path | None = None
    level: int | None = None

    def __post_init__(self) -> None:
        for name, numbers in (("batch", self.batch), ("window", self.window)):
            least, best, most = numbers
            if not 1 <= least <= best <= most:
                raise InputError.of(name, _comma(numbers), "1 <= least <= best <= most, as in 1,8,32")
        if self.level is not None and not 0 <= self.level <= 5:
            raise InputError.of("level", self.level, "0 (fastest build) to 5 (fastest engine)")

    def check(self, bundle: Bundle) -> None:
        """Refuse now what TensorRT would after minutes, and windows that no step has. Raises InputError."""
        shape, precision = bundle.manifest.config, bundle.manifest.precision
        most, widest, last = self.batch[2], self.window[2], max(1, shape.tokens - 1)
        if widest > last:
            expected = f"{last} at most, as in 1,{max(1, shape.tokens // 4)},{last}"
            why = f"this model has {shape.tokens} patches, and a window ends before the last one"
            raise InputError.of("window", _comma(self.window), expected, why)
        cache = 2 * cache_row(shape, precision)  # bytes of a guided image
        numbers = 2 * max(shape.width * shape.tokens, widest * max(4 * shape.width, shape.heads * shape.tokens))
        limit = max(1, min(_LARGEST_GPU // cache, _LARGEST_TENSOR // numbers))
        if most > limit:
            expected = f"{limit} at most for this model, as in 1,{min(8, limit)},{min(32, limit)}"
            why = f"for {most} guided images the cache takes {size_text(most * cache)} and the largest tensor has "
            why += f"{most * numbers} numbers, where TensorRT counts to {_LARGEST_TENSOR}"
            raise InputError.of("batch", _comma(self.batch), expected, why)

    def profiles(self, config: ModelShape) -> dict[str, tuple[Profile, ...]]:
        """What each kind of engine is built for: plain and guided, single steps and windows, batches that fit."""
        single = [Profile(branches, self.batch) for branches in (1, 2)]
        if self.window[2] > 1:
            single += [Profile(branches, self.batch, self.window) for branches in (1, 2)]
        forward = tuple(Profile(branches, self._fitting(forward_row(config, branches))) for branches in (1, 2))
        gradient = (Profile(1, self._fitting(gradient_row(config))),)
        return {"step": tuple(single), "forward": forward, "gradient": gradient}

    def _fitting(self, row: int) -> Range:
        """Batches of which so many bytes an image fit."""
        least, best, most = (min(size, USUAL.rows(row)) for size in self.batch)
        return least, best, most


def _comma(numbers: Range) -> str:
    return ",".join(map(str, numbers))
