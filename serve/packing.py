"""Samples on their way out: a grid, pictures in a zip, an array; headers, and the text inside pictures."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np

from ..runtime.image import grid, png
from .batcher import Drawn
from .drawing import Format, style_of
from .protocol import json_numbers
from .service import Refusal, Service

MEDIA: dict[Format, str] = {"png": "image/png", "zip": "application/zip", "npy": "application/x-npy"}
_MOST_NUMBERS = 64  # in a header
_MOST_PIXELS = 1 << 25  # of all pictures in an answer


def headers_of(drawn: Drawn) -> dict[str, str]:
    """What a client that reads only the headers should know."""
    headers = {"X-Tarflow-Shape": ",".join(map(str, drawn.images.shape)), "X-Tarflow-Seed": str(drawn.request.seed)}
    if drawn.nonfinite:
        headers["X-Tarflow-Nonfinite"] = ranges(drawn.nonfinite)
    if drawn.certificate is not None:
        known = drawn.certificate[np.isfinite(drawn.certificate)]
        if drawn.suspects:
            headers["X-Tarflow-Suspects"] = ranges(drawn.suspects)
        headers["X-Tarflow-Certificate"] = f"{known.max(initial=0):.3g}" if len(known) else "nan"
    if drawn.log_prob is not None:  # proxies refuse headers of many kilobytes
        more = ["..."] if len(drawn.log_prob) > _MOST_NUMBERS else []
        headers["X-Tarflow-Log-Prob"] = ",".join([*map(repr, drawn.log_prob[:_MOST_NUMBERS].tolist()), *more])
    return headers


def ranges(indices: tuple[int, ...], most: int = 100) -> str:
    """3, 4, 5, 9 -> "3-5,9"; after ``most`` ranges, "..."."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    words = [str(low) if low == high else f"{low}-{high}" for low, high in runs[:most]]
    return ",".join([*words, *(["..."] if len(runs) > most else [])])


class Packing:
    """How one answer's pictures are made: ``zoom`` repeats each pixel; None: up to 48 pixels.

    Raises Refusal for pictures of ``n`` samples that would take seconds and gigabytes to pack.
    """

    def __init__(self, service: Service, n: int, zoom: int | None) -> None:
        size = service.flow.config.image_size
        self.bundle_hash, self.zoom = service.flow.bundle.hash, zoom or max(1, 48 // size)
        pixels = n * (size * self.zoom) ** 2
        if pixels > _MOST_PIXELS:
            cure = "ask for less zoom" if self.zoom > 1 else "ask for npy, or for fewer"
            found = f"{n} images at zoom {self.zoom} are {pixels:,} pixels"
            raise Refusal(400, f"{found}; expected {_MOST_PIXELS:,} at most: {cure}")

    def size(self, drawn: Drawn) -> int:
        """About how many bytes of pictures there are to pack."""
        return int(drawn.images.nbytes * self.zoom**2)

    def as_grid(self, drawn: Drawn) -> bytes:
        return png(grid(drawn.images), self._text(drawn), self.zoom)

    def as_single(self, drawn: Drawn) -> bytes:
        return png(grid(drawn.images[:1], gap=0), self._text(drawn), self.zoom)

    def as_zip(self, drawn: Drawn) -> bytes:
        """Pictures named by seed and index, and samples.json; the same samples give the same bytes."""
        file, samples, request = io.BytesIO(), [], drawn.request
        labels = request.classes().tolist()
        checked = (drawn.certificate, drawn.log_prob)
        errors, log_prob = ([None] * request.n if found is None else json_numbers(found) for found in checked)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for i, image in enumerate(drawn.images):
                index = request.first_sample + i
                name = f"{request.seed}-{index}.png"
                archive.writestr(zipfile.ZipInfo(name), png(grid(image[None], gap=0), {}, self.zoom))
                samples.append({
                    "file": name, "index": index, "label": labels[i], "finite": index not in drawn.nonfinite,
                    "certificate": errors[i], "suspect": index in drawn.suspects, "log_prob": log_prob[i],
                })  # fmt: skip
            said = {"bundle_hash": self.bundle_hash, "seed": request.seed, "style": style_of(request)}
            said |= {} if drawn.density is None else {"density": drawn.density}
            archive.writestr(zipfile.ZipInfo("samples.json"), json.dumps(said | {"samples": samples}, indent=1))
        return file.getvalue()

    def _text(self, drawn: Drawn) -> dict[str, str]:
        first = drawn.request.first_sample
        text = {
            "Software": "tarflow",
            "seed": str(drawn.request.seed),
            "sample_indices": f"{first}-{first + len(drawn.images) - 1}",
            "bundle_hash": self.bundle_hash,
        }
        return text | ({"nonfinite": ranges(drawn.nonfinite)} if drawn.nonfinite else {})


def array(drawn: Drawn) -> bytes:
    """The images as a .npy file."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(drawn.images))
    return file.getvalue()
