"""A feature network: any ONNX graph that takes images and gives vectors. Inception, CLIP, or something small.

Images are always 8 bits first, as files of pictures hold them, so that samples just drawn and samples read back give
the same features.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..runtime.backend import pad_rows
from ..runtime.errors import BundleError, InputError
from ..runtime.files import sha256
from ..runtime.ort.library import load_onnxruntime

if TYPE_CHECKING:
    import onnxruntime

RANGES = ("-1,1", "0,1", "0,255", "imagenet")
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixels in 0..1
_TYPES: dict[str, DTypeLike] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
_EXTERNAL = re.compile(rb"\x0a\x08location\x12([\x01-\x7f])", re.S)  # of a tensor's external_data; its name follows
_BATCH = 64
_LARGEST = 4096  # pixels a side


@dataclass(frozen=True, slots=True)
class Usage:
    """How a network is used, where its graph leaves it open.

    ``feature_output`` names the layer, if there are several; ``feature_size`` is the side that images are resized to,
    if the graph does not say; ``feature_range`` what the network was trained on: one of RANGES, by default -1,1, or
    0,255 for a graph of bytes. Raises InputError for what is none of these.
    """

    feature_output: str | None = None
    feature_size: int | None = None
    feature_range: str | None = None

    def __post_init__(self) -> None:
        if self.feature_size is not None and not 1 <= self.feature_size <= _LARGEST:
            raise InputError.of("feature_size", self.feature_size, f"1 to {_LARGEST} pixels")
        if self.feature_range is not None and self.feature_range not in RANGES:
            raise InputError.of("feature_range", f"'{self.feature_range}'", f"one of {', '.join(RANGES)}")


@dataclass(frozen=True, slots=True)
class Preparation:
    """How 8-bit images (N, C, H, W) become a network's input.

    ``size`` is the side they are resized to (bicubic, antialiased), None for their own; ``range`` one of RANGES.
    """

    size: int | None
    range: str
    channels: int
    channels_last: bool
    dtype: DTypeLike

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        x = images if images.shape[1] == self.channels else np.repeat(images, self.channels, 1)
        pixels: NDArray[Any] = x.astype(np.float32)
        if self.size is not None and self.size != x.shape[-1]:
            pixels = _resize(pixels, self.size)
        if self.range == "imagenet":
            mean, std = (np.array(row, np.float32)[:, None, None] for row in (_IMAGENET_MEAN, _IMAGENET_STD))
            pixels = (pixels / 255 - mean) / std
        else:
            low, high = map(float, self.range.split(","))
            pixels = pixels / 255 * (high - low) + low
        if self.dtype == np.uint8:
            pixels = np.rint(pixels.clip(0, 255))
        return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1) if self.channels_last else pixels, self.dtype)


_AS_IT_IS = Usage()


class FeatureNetwork:
    """An opened network; call it with 8-bit images (N, C, H, W) to get features (N, F) float32."""

    def __init__(
        self, session: onnxruntime.InferenceSession, output: str, batch: int, prepare: Preparation, identity: str
    ) -> None:
        self.session, self.output, self.batch, self.prepare = session, output, batch, prepare
        self.identity = identity  # of file, layer and preparation: features compare only where it is the same

    @classmethod
    def open(cls, path: str | os.PathLike[str], usage: Usage = _AS_IT_IS, threads: int | None = None) -> FeatureNetwork:
        """Open an ONNX file with one input, images, as (N, C, H, W) or (N, H, W, C).

        Raises InputError for a network that cannot be used so, BundleError for a file that is no ONNX graph.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no feature network at '{path}'; expected an .onnx file")
        session = _open_session(path, threads)
        batch, prepare = _preparation(session, path, usage)
        layer = _output(session, path, usage.feature_output)
        identity = f"{_hash(path)} {layer} {prepare.size or 'own size'} {prepare.range}"
        return cls(session, layer, batch, prepare, identity)

    def __call__(
        self, images: NDArray[np.uint8], tell: Callable[[float], None] = lambda share: None
    ) -> NDArray[np.float32]:
        """8-bit images (N, C, H, W) -> features (N, F). Positions of a layer (N, F, h, w) are averaged. ``tell`` is
        told what share is done.

        Raises InputError for images the network cannot take.
        """
        channels = self.prepare.channels
        if images.shape[1] not in (1, channels):
            raise InputError(f"images have {images.shape[1]} channels; this feature network takes {channels}")
        features = []
        for start in range(0, len(images), self.batch):
            tell(start / len(images))
            features.append(self._features(images[start : start + self.batch]))
        return np.concatenate(features)

    def _features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        feed = pad_rows(self.prepare(images), self.batch)
        try:
            (found,) = self.session.run([self.output], {self.session.get_inputs()[0].name: feed})
        except Exception as error:  # onnxruntime's own exceptions have no public base
            raise InputError(
                f"the feature network does not take images of shape {feed.shape[1:]} ({str(error)[:160]}); "
                "try another `feature_size`",
                field="feature_size",
            ) from None
        features = np.asarray(found, np.float32)
        if features.ndim < 2 or len(features) != len(feed):
            raise InputError(
                f"output '{self.output}' has shape {features.shape}; expected (N, F) or (N, F, h, w): another "
                "`feature_output`?",
                field="feature_output",
            )
        vectors: NDArray[np.float32] = features[: len(images)].reshape(len(images), features.shape[1], -1).mean(2)
        return vectors


def _hash(path: Path) -> str:
    """SHA-256 of an ONNX file; of one whose weights lie in other files, of all their hashes."""
    content = path.read_bytes()
    places = {content[m.end() : m.end() + m[1][0]].decode("utf-8", "replace") for m in _EXTERNAL.finditer(content)}
    others = [sha256(path.parent / place) for place in sorted(places) if (path.parent / place).is_file()]
    return hashlib.sha256(" ".join([sha256(path), *others]).encode()).hexdigest() if others else sha256(path)


def _open_session(path: Path, threads: int | None) -> onnxruntime.InferenceSession:
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        opened: onnxruntime.InferenceSession = ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        return opened
    except Exception as error:  # onnxruntime's own exceptions have no public base
        raise BundleError(
            f"'{path}' cannot be opened as an ONNX network ({str(error)[:160]}); export it with torch.onnx.export"
        ) from None


def _preparation(session: onnxruntime.InferenceSession, path: Path, usage: Usage) -> tuple[int, Preparation]:
    """The batch the network takes, and how images are prepared for it."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(f"{i.name} {i.shape}" for i in inputs)
        raise InputError(
            f"'{path}' has {len(inputs)} inputs ({names}); expected one, images: export it with images alone"
        )
    (images,) = inputs
    shape: Sequence[int | str | None] = images.shape
    if len(shape) != 4 or images.type not in _TYPES:
        raise InputError(
            f"'{path}' takes {images.type} of shape {shape}; expected images, float or uint8: (N, C, H, W) or "
            "(N, H, W, C)"
        )
    last = shape[1] not in (1, 3) and shape[3] in (1, 3)
    channels, side = (shape[3], shape[1]) if last else (shape[1], shape[2])
    if isinstance(channels, int) and channels not in (1, 3):
        raise InputError(f"'{path}' takes images of {channels} channels; expected 1 or 3")
    if isinstance(side, int) and usage.feature_size not in (None, side):
        raise InputError.of("feature_size", usage.feature_size, f"{side}, which '{path}' takes", "leave it out")
    dtype = _TYPES[images.type]
    prepare = Preparation(
        size=side if isinstance(side, int) else usage.feature_size,
        range=usage.feature_range or ("0,255" if dtype == np.uint8 else "-1,1"),
        channels=channels if isinstance(channels, int) else 3,
        channels_last=last,
        dtype=dtype,
    )
    return (shape[0] if isinstance(shape[0], int) and shape[0] > 0 else _BATCH), prepare


def _output(session: onnxruntime.InferenceSession, path: Path, wanted: str | None) -> str:
    names = {output.name: output.shape for output in session.get_outputs()}
    if wanted is not None and wanted not in names:
        message = f"'{path}' has no output '{wanted}'; it has {', '.join(names)}"
        raise InputError(message, field="feature_output", found=wanted, expected=", ".join(names))
    if wanted is None and len(names) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in names.items())
        message = f"'{path}' has {len(names)} outputs ({listed}); choose one with `feature_output`"
        raise InputError(message, field="feature_output", expected=", ".join(names))
    return wanted or next(iter(names))


def _resize(pixels: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """(N, C, H, W) -> (N, C, size, size), channel by channel in float32, so that nothing is rounded in between."""
    from PIL import Image

    planes = pixels.reshape(-1, *pixels.shape[2:])
    resized = [np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC)) for plane in planes]
    return np.stack(resized).reshape(*pixels.shape[:2], size, size)
