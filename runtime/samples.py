"""What drawing gives: images that remember how they were drawn, and what can be watched on the way."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from .backend import Array, Doubles
from .errors import InputError
from .fields import check_field
from .image import grid, png, write_picture
from .report import CertifiedReport as CertifiedReport
from .report import Report as Report
from .report import largest_finite as largest_finite
from .report import nonfinite as nonfinite
from .report import suspect_limit as suspect_limit
from .report import suspects as suspects

if TYPE_CHECKING:
    from PIL import Image

_SHOWN = 256  # images of which a notebook shows a picture


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: ``done`` of ``total`` sequential steps, now in ``block`` at ``position``."""

    done: int
    total: int
    block: int
    position: int


@dataclass(frozen=True, slots=True)
class Stage:
    """What is done to batches once they are decoded: ``done`` of ``total`` such passes, now to ``name``, which is
    "certify" or "denoise".
    """

    name: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Preview:
    """What some samples look like after ``block``, which took ``seconds``: ``images`` (N, channels, size, size), from
    sample ``first`` on.
    """

    block: int
    first: int
    images: Array
    seconds: float


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is told of a run: ``progress`` each finished position, ``preview`` each batch after each block, blocks last
    to first, ``stage`` when a batch begins to be certified or denoised, and ends. An exception of any cancels. Raises
    InputError for what cannot be called.
    """

    progress: Callable[[Progress], None] | None = None
    preview: Callable[[Preview], None] | None = None
    stage: Callable[[Stage], None] | None = None

    def __post_init__(self) -> None:
        check_field("progress", self.progress, "a function", optional=True)
        check_field("preview", self.preview, "a function", optional=True)
        check_field("stage", self.stage, "a function", optional=True)


class Samples(np.ndarray[Any, np.dtype[np.float32]]):
    """Images (N, channels, size, size) float32, in [-1, 1] units, which they may leave (nothing is clipped), that
    remember in ``report`` how they were drawn.

    Rows of them (a slice, a list of indices, a mask), copies and pickles have the part of the report that is theirs.
    Of anything else that is made of them ``report`` is None: it is no samples any more. What is written into them in
    place is not noticed.
    """

    _report: Report | None

    def __array_finalize__(self, parent: object) -> None:
        self._report = None

    @property
    def report(self) -> Report:
        return self._report  # type: ignore[return-value]  # of what Flow.sample returns, and rows of it, there is one

    @property
    def certificate(self) -> Array | None:
        """(N,): the round-trip error of each sample, ``report.certificate``; None if it was not asked for."""
        return None if self._report is None else self._report.certificate

    @property
    def log_prob(self) -> Doubles | None:
        """(N,) float64: the log-density of each raw sample in nats, ``report.log_prob``; None without certificate."""
        return None if self._report is None else self._report.log_prob

    # --- pictures -------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all images in one picture, whole or not at all, in the format of the suffix: .png, .jpg or .webp.

        Raises InputError for another suffix, and where this is no longer images.
        """
        write_picture(path, grid(self._images()), self._text(), self._zoom)

    def pil(self) -> Image.Image:
        """The picture that :meth:`save` writes, as Pillow has it."""
        from PIL import Image

        return Image.open(io.BytesIO(png(grid(self._images()), self._text(), self._zoom)))

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows; None, and so the numbers, where this is no longer samples."""
        if self._report is None or not len(self):
            return None
        return png(grid(self._images()[:_SHOWN]), self._text(), self._zoom)

    def _repr_html_(self) -> str | None:
        """The picture, and a line of what is known of it."""
        picture = self._repr_png_()
        if picture is None or self._report is None:
            return None
        words = [f"{len(self)} samples" + (f", the first {_SHOWN} of them shown" if len(self) > _SHOWN else "")]
        words += [f"{name} {value}" for name, value in self._text().items() if name != "Software"]
        if self.certificate is not None and self.log_prob is not None:
            largest = self._report.largest_certificate
            words.append("no round trip is finite" if largest is None else f"round-trip error {largest:.2g} at most")
            words.append(f"log-density {self.log_prob.min():.6g} to {self.log_prob.max():.6g} nats")
        if self._report.nonfinite:
            words.append(f"not finite: {', '.join(map(str, self._report.nonfinite[:_SHOWN]))}")
        data = base64.b64encode(picture).decode()
        return f'<img src="data:image/png;base64,{data}"/><br/><small>{html.escape("; ".join(words))}</small>'

    def _images(self) -> Samples:
        if self.ndim != 4 or not len(self):
            found = f"an array of shape {self.shape}"
            raise InputError.of("images", found, "(N, channels, size, size), one image or more", "keep rows whole")
        return self

    @property
    def _zoom(self) -> int:
        return max(1, 48 // int(self.shape[-1]))

    def _text(self) -> dict[str, str]:
        """What is told in a picture."""
        report, text = self._report, {"Software": "tarflow"}
        if report is None:
            return text
        first, samples = report.first_sample, report.samples
        indices = ", ".join(map(str, samples)) if first is None else f"{first}-{samples[-1]}"
        return text | {"seed": "given noise" if report.seed is None else str(report.seed), "sample_indices": indices}

    # --- rows, copies and pickles ---------------------------------------------------------------------------------

    @overload  # type: ignore[override]  # numpy's stub knows no rows
    def __getitem__(self, key: slice) -> Self: ...
    @overload
    def __getitem__(self, key: Any) -> Any: ...
    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if self._report is not None and isinstance(found, Samples) and found.ndim == self.ndim == 4:
            rows = _rows(key, len(self))
            if rows is not None and found.shape[1:] == self.shape[1:]:
                found.with_report(self._report.of(rows))
        return found

    def copy(self, order: Any = "C") -> Self:
        return super().copy(order).view(type(self)).with_report(self._report)

    def __copy__(self) -> Self:
        return self.copy("K")

    def __deepcopy__(self, memo: Any) -> Self:
        return self.copy("K")

    def __reduce__(self) -> Any:
        found: Any = super().__reduce__()
        make, arguments, state = found
        return make, arguments, (state, self._report)

    def __setstate__(self, state: Any) -> None:
        own, report = state
        super().__setstate__(own)
        self._report = report

    def with_report(self, report: Report | None) -> Self:
        """The same object, with this report from now on."""
        self._report = report
        return self


class CertifiedSamples(Samples):
    """Samples for which a certificate was asked."""

    @property
    def report(self) -> CertifiedReport:
        return super().report  # type: ignore[return-value]

    @property
    def certificate(self) -> Array:
        return super().certificate  # type: ignore[return-value]

    @property
    def log_prob(self) -> Doubles:
        return super().log_prob  # type: ignore[return-value]


def _rows(key: Any, count: int) -> NDArray[np.intp] | None:
    """Which of ``count`` rows a key selects, whole and in this order; None for one that selects something else."""
    first, *rest = (key if isinstance(key, tuple) else (key,)) or (Ellipsis,)
    if not all(part is Ellipsis or (isinstance(part, slice) and part == slice(None)) for part in rest):
        return None
    rows = np.arange(count)[first]
    return rows if rows.ndim == 1 else None
