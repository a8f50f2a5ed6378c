"""Images that a command is given, a folder of pictures or an array, and those that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ..runtime.bundle import Bundle, Manifest, ModelShape
from ..runtime.errors import InputError
from ..runtime.files import check_writable, replacing
from .console import parse_labels, read_array, say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..runtime.flow import Flow
    from ..runtime.picture_folder import PictureFolder


Range = Annotated[str | None, Option(help="Of float images: -1,1, 0,1 or 0,255. Default: -1,1, where it is clear.")]
Save = Annotated[Path | None, Option(help="Write float32 (N, C, H, W) as .npy or .npz: unclipped, some leave [-1, 1].")]
_MOST_NOTES = 5
ARRAYS = (".npy", ".npz")


@dataclass(frozen=True, slots=True)
class GivenImages:
    """Images (N, channels, size, size) of a model's shape, uint8 or floats; and the folder, where they are pictures."""

    pixels: NDArray[Any]
    folder: PictureFolder | None = None

    def classes(self, labels: str | None, manifest: Manifest) -> NDArray[np.int64] | None:
        """The labels that were given for them; else, for a model with classes, their sub-folders: by name if these are
        names of its classes, else in order. Raises InputError.
        """
        config, names = manifest.config, manifest.class_names
        import numpy as np

        if labels is not None:
            return parse_labels(labels, 0, len(self.pixels))
        if self.folder is None or not self.folder.classes or not config.classes:
            return None
        if set(self.folder.classes) <= set(names) and len(set(names)) == len(names):
            return np.array([names.index(name) for name in self.folder.classes])[self.folder.labels]
        if len(self.folder.classes) != config.classes:
            raise InputError(
                f"'{self.folder.root}' has {len(self.folder.classes)} sub-folders, which are classes, and this model "
                f"has {config.classes} classes: say which are whose with --labels (-1 for none)"
            )
        return self.folder.labels


def read_images(path: Path, config: ModelShape, values: str | None) -> GivenImages:
    """Images of a folder, of shards, a picture or an array, floats in [-1, 1] units; ``values`` names a range of SPANS.

    Pictures of another size or shape become as a server makes them, which is said. Raises InputError for arrays that
    are not of the model's shape, and for floats that may be of several ranges.
    """
    import numpy as np

    from ..runtime.inputs import SPANS
    from ..runtime.picture import PictureReader
    from ..runtime.picture_folder import SUFFIXES as PICTURE_SUFFIXES
    from ..runtime.picture_folder import list_pictures
    from ..shards.contents import is_drawn, read_shards

    if values is not None and values not in SPANS:
        raise InputError.of("range", f"'{values}'", ", ".join(SPANS))
    if is_drawn(path):
        return GivenImages(np.concatenate(list(read_shards(path, config.image))))
    if path.is_dir() or (path.is_file() and path.suffix.lower() in PICTURE_SUFFIXES):
        found = list_pictures(path)
        for note in found.notes():
            say(note)
        pixels, done = found.read_noted(PictureReader(config.channels, config.image_size))
        for note, count in done.most_common(_MOST_NOTES):
            say(f"{count} of {len(pixels)} pictures in '{path}': {note}")
        if len(done) > _MOST_NOTES:
            say(f"and {sum(done.values()) - sum(n for _, n in done.most_common(_MOST_NOTES))} alike, of other sizes")
        return GivenImages(pixels, found)
    expected = "a picture, a folder of pictures, or an array saved with numpy.save"
    if not path.exists():
        raise InputError(f"no images at '{path}'; expected {expected}")
    try:
        stored = read_array(path, "images")
    except InputError as error:
        if path.suffix.lower() in ARRAYS or path.is_dir():
            raise
        raise InputError(f"'{path}' holds no images; expected {expected}") from error
    known = stored.dtype.kind == "f" or stored.dtype == "uint8"
    if stored.ndim != 4 or stored.shape[1:] != config.image or not len(stored) or not known:
        expected = f"(N, {', '.join(map(str, config.image))}), uint8 or floats in [-1, 1]"
        raise InputError(f"'{path}' holds {stored.dtype} of shape {stored.shape}; expected {expected}")
    return GivenImages(stored if stored.dtype == "uint8" else _in_units(stored, values, path))


def _in_units(stored: NDArray[Any], values: str | None, path: Path) -> NDArray[Any]:
    from ..runtime.inputs import SPANS, check_bounded, in_units, is_ambiguous

    if values is None and is_ambiguous(stored):
        raise InputError(
            f"'{path}' holds floats of which none is negative and none above 1: pictures in [0, 1], or a part of "
            "[-1, 1]? Say which: --range 0,1 or --range -1,1"
        )
    try:
        return check_bounded(in_units(stored, SPANS[values or "-1,1"]))
    except InputError as error:
        raise InputError(f"'{path}': {error}, or say what range they have: --range {' or '.join(SPANS)}") from None


def as_trained_on(flow: Flow, images: NDArray[Any], seed: int) -> NDArray[Any]:
    """8-bit images with the noise the model was trained on; floats as they are."""
    return flow.dequantise(images, seed) if images.dtype == "uint8" else images


def write_images(images: NDArray[Any], files: Mapping[str, Path], bundle: Bundle, text: Mapping[str, str]) -> None:
    """Write an "array" and a "picture" of images, each whole or not at all; ``text`` is told in the picture."""
    import numpy as np

    from ..runtime.image import grid, write_picture

    if "array" in files:
        with replacing(files["array"]) as file:
            if files["array"].suffix.lower() == ".npz":
                np.savez(file, **_arrays(images))  # type: ignore[arg-type]  # mypy takes a name for an option of numpy's
            else:
                np.save(file, images)
    if "picture" in files:
        about = {"Software": "tarflow", **text, "bundle_hash": bundle.hash}
        write_picture(files["picture"], grid(images), about, zoom=max(1, 48 // images.shape[-1]))


def _arrays(images: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """What a .npz holds of images: themselves, and of samples that were certified what was found."""
    import numpy as np

    report = getattr(images, "report", None)
    found = {"images": np.asarray(images)}
    if report is not None:
        found |= {"log_prob": report.log_prob, "certificate": report.certificate}
    return {name: array for name, array in found.items() if array is not None}


def files_asked(save: Path | None, output: Path | None, default: str) -> dict[str, Path]:
    """The files to write: a picture, by default called so, unless only an array is asked for. Raises InputError for a
    suffix that names no format and a place that takes no files, MachineError for one that cannot be written.
    """
    from ..runtime.image import PICTURES, check_suffix

    files = {}
    if save is not None:
        check_suffix(save, ARRAYS, "save")
        files["array"] = save
    if output is not None or save is None:
        files["picture"] = output or Path(default)
        check_suffix(files["picture"], PICTURES, "output")
    for path in files.values():
        check_writable(path)
    return files
