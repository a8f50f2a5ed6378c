"""Images that a command is given, a folder of pictures or an array, and those that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ..runtime.bundle import Bundle, ModelShape
from ..runtime.errors import InputError
from ..runtime.files import check_writable, replacing
from .console import read_array

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..runtime.flow import Flow


Save = Annotated[Path | None, Option(help="Write float32 (N, C, H, W), unclipped, as .npy.")]


def read_images(path: Path, config: ModelShape) -> tuple[NDArray[Any], list[str] | None]:
    """Images (N, channels, size, size) of a model, uint8 or floats, and the names of pictures. Raises InputError."""
    if path.is_dir():
        from ..runtime.picture_folder import read_folder

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


def write_images(images: NDArray[Any], files: Mapping[str, Path], bundle: Bundle, text: Mapping[str, str]) -> None:
    """Write an "array" and a "picture" of images, each whole or not at all; ``text`` is told in the picture."""
    import numpy as np

    from ..runtime.image import grid, write_png

    if "array" in files:
        with replacing(files["array"]) as file:
            np.save(file, images)
    if "picture" in files:
        about = {"Software": "tarflow", **text, "bundle_hash": bundle.hash}
        write_png(files["picture"], grid(images), about, zoom=max(1, 48 // images.shape[-1]))


def files_asked(save: Path | None, output: Path | None, default: str) -> dict[str, Path]:
    """The files to write: a picture, by default called so, unless only an array is asked for. Raises InputError for a
    place that takes no files, MachineError for one that cannot be written.
    """

    asked = {"array": save, "picture": output if save or output else Path(default)}
    files = {kind: path for kind, path in asked.items() if path is not None}
    for path in files.values():
        check_writable(path)
    return files
