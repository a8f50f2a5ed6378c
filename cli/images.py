"""Images that a command is given: a folder of pictures, or an array."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import InputError
from .console import read_array

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..runtime.bundle import ModelShape
    from ..runtime.flow import Flow


def read_images(path: Path, config: ModelShape) -> tuple[NDArray[Any], list[str] | None]:
    """Images (N, channels, size, size) of a model, uint8 or floats, and the names of pictures. Raises InputError."""
    if path.is_dir():
        from ..runtime.image import read_folder

        return read_folder(path, config.channels, config.image_size)
    if not path.exists():
        raise InputError(f"no images at '{path}'; expected a folder of pictures, or an array saved with numpy.save")
    stored = read_array(path, "images")
    known = stored.dtype.kind == "f" or stored.dtype == "uint8"
    if stored.ndim != 4 or stored.shape[1:] != config.image or not len(stored) or not known:
        expected = f"(N, {', '.join(map(str, config.image))}), uint8 or floats in [-1, 1]"
        raise InputError(f"'{path}' holds {stored.dtype} of shape {stored.shape}; expected {expected}")
    return stored, None


def as_trained_on(flow: Flow, images: NDArray[Any], seed: int) -> NDArray[Any]:
    """8-bit images with the noise the model was trained on; floats as they are."""
    return flow.dequantise(images, seed) if images.dtype == "uint8" else images
