"""Reading a picture, from a file or from bytes, as a model takes it; and saying what was done to it on the way."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

if TYPE_CHECKING:
    from PIL import Image

_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as the model takes it, (channels, size, size) uint8, and what was done to it, a sentence each."""

    pixels: NDArray[np.uint8]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PictureReader:
    """How pictures become (channels, size, size) uint8, 1 channel for grey ones or 3 for colours.

    ``upright`` turns them as their EXIF data says. ``on_white`` puts transparent parts on white; without it alpha is
    dropped, and what lies below shows. ``fit`` crops to the middle square and resizes, bicubic; without it a picture of
    another size is refused. ``formats`` are Pillow's names of those accepted (None: all it knows), ``most_pixels`` are
    counted from the header, before anything is decoded (None: Pillow's own limit). Raises InputError for other channel
    counts, which no file of a picture has.
    """

    channels: int
    size: int
    upright: bool = True
    on_white: bool = True
    fit: bool = True
    formats: tuple[str, ...] | None = None
    most_pixels: int | None = None

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise InputError(
                f"pictures have 1 or 3 channels; this model has {self.channels}: give arrays instead of pictures",
                field="channels",
                found=self.channels,
                expected="1 or 3",
            )

    def read(self, source: bytes | Path) -> Picture:
        """The picture in a file, or in the bytes of one.

        Raises InputError for what is no picture, damaged, too large, of more than 8 bits a channel, or not accepted.
        """
        from PIL import Image

        file, name = (io.BytesIO(source), "the picture") if isinstance(source, bytes) else (source, f"'{source}'")
        try:
            with Image.open(file, formats=self.formats) as opened:
                self._check(opened, name)
                opened.load()
                return self._made(opened)
        except (OSError, SyntaxError, ValueError, OverflowError, Image.DecompressionBombError) as error:
            if isinstance(error, InputError):
                raise
            why = "" if isinstance(source, bytes) else f" ({error})"
            cure = f"expected a whole {' or '.join(self.formats)} file" if self.formats else "repair or remove it"
            raise InputError(f"{name} cannot be read as an image{why}; {cure}") from None

    def _check(self, opened: Image.Image, name: str) -> None:
        """Refuse by the header alone."""
        width, height = opened.size
        if self.most_pixels is not None and width * height > self.most_pixels:
            raise InputError(f"{name} has {width}x{height} pixels; expected {self.most_pixels:,} at most: shrink it")
        if opened.mode.startswith(("I", "F")):
            raise InputError(f"{name} has more than 8 bits a channel (mode {opened.mode}); save it with 8")
        if not self.fit and opened.size != (self.size, self.size):
            raise InputError(f"{name} is {width}x{height} pixels; this model takes {self.size}x{self.size}: resize it")

    def _made(self, opened: Image.Image) -> Picture:
        from PIL import Image, ImageOps

        picture, notes = opened, []
        if self.upright:
            picture = ImageOps.exif_transpose(opened)
            if opened.getexif().get(_ORIENTATION) in range(2, 9):
                notes.append("turned upright, as its EXIF data says")
        if self.on_white and ("A" in picture.getbands() or "transparency" in picture.info):
            clear = picture.convert("RGBA")
            if clear.getchannel("A").getextrema() != (255, 255):
                notes.append("transparent parts were put on white")
            picture = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
        if self.channels == 1 and not _is_grey(picture):
            notes.append("colours became shades of gray")
        picture = picture.convert("L" if self.channels == 1 else "RGB")
        if picture.size != (self.size, self.size):
            was, side = picture.size, min(picture.size)
            cropped = "" if was[0] == was[1] else f" cropped to its middle {side}x{side},"
            notes.append(f"the picture is {was[0]}x{was[1]} pixels:{cropped} resized to {self.size}x{self.size}")
            picture = ImageOps.fit(picture, (self.size, self.size), Image.Resampling.BICUBIC)
        pixels = np.asarray(picture, np.uint8).reshape(self.size, self.size, self.channels).transpose(2, 0, 1)
        return Picture(np.ascontiguousarray(pixels), tuple(notes))


def _is_grey(picture: Image.Image) -> bool:
    if picture.mode in ("1", "L", "LA"):
        return True
    pixels = np.asarray(picture.convert("RGB"))
    return bool((pixels == pixels[:, :, :1]).all())
