"""Reading a picture, from a file or from bytes, as a model takes it; and saying what was done to it on the way."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

if TYPE_CHECKING:
    from PIL import Image

# Pillow knows dozens more; among them are some that start other programs, and some that nobody has tried on strangers.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MOST_PIXELS = 1 << 26  # 8192 x 8192, 192 MiB once decoded

_MOST_SCANS = 100  # of a JPEG: photographs have about ten, and each costs a pass over all pixels
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")  # of a JPEG; inside a scan, 0 or a restart follows 0xff
_WITHOUT_LENGTH = (0x01, 0xD8)  # markers
_SCAN, _END = 0xDA, 0xD9


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as the model takes it, (channels, size, size) uint8, and what was done to it, a sentence each."""

    pixels: NDArray[np.uint8]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PictureReader:
    """How pictures become (channels, size, size) uint8, 1 channel for grey ones or 3 for colours.

    They are turned as their EXIF data says, and transparent parts are put on white. ``fit`` crops to the middle square
    and resizes, bicubic; without it a picture of another size is refused. ``formats`` are Pillow's names of those
    accepted; ``most_pixels`` are counted from the header, before anything is decoded. Raises InputError for other
    channel counts, which no file of a picture has.
    """

    channels: int
    size: int
    fit: bool = True
    formats: tuple[str, ...] = FORMATS
    most_pixels: int = MOST_PIXELS

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

        Raises InputError for what is no picture, damaged, too large, animated, of more than 8 bits a channel, or not
        accepted. Whatever a decoder raises is the picture's fault: they raise nearly everything.
        """
        from PIL import Image

        file, name = (io.BytesIO(source), "the picture") if isinstance(source, bytes) else (source, f"'{source}'")
        try:
            with Image.open(file, formats=self.formats) as opened:
                self._check(opened, name)
                _check_scans(opened, source, name)
                opened.load()
                return self._made(opened)
        except InputError:
            raise
        except Exception as error:
            why = "" if isinstance(source, bytes) else f" ({error})"
            cure = f"expected a whole {', '.join(self.formats[:-1])} or {self.formats[-1]} file"
            raise InputError(f"{name} cannot be read as an image{why}; {cure}") from None

    def _check(self, opened: Image.Image, name: str) -> None:
        """Refuse by the header alone."""
        width, height = opened.size
        if width * height > self.most_pixels:
            raise InputError(f"{name} has {width}x{height} pixels; expected {self.most_pixels:,} at most: shrink it")
        if opened.mode.startswith(("I", "F")):
            raise InputError(f"{name} has more than 8 bits a channel (mode {opened.mode}); save it with 8")
        if getattr(opened, "is_animated", False) and opened.format != "MPO":  # a JPEG with a smaller copy of itself
            raise InputError(f"{name} has several frames or pages; expected one: save the one that is meant")
        if not self.fit and opened.size != (self.size, self.size):
            raise InputError(f"{name} is {width}x{height} pixels; this model takes {self.size}x{self.size}: resize it")

    def _made(self, opened: Image.Image) -> Picture:
        from PIL import Image, ImageOps

        picture, notes = ImageOps.exif_transpose(opened), []
        if opened.getexif().get(_ORIENTATION) in range(2, 9):
            notes.append("turned upright, as its EXIF data says")
        if "A" in picture.getbands() or "transparency" in picture.info:
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


def _check_scans(opened: Image.Image, source: bytes | Path, name: str) -> None:
    """Refuse a JPEG whose scans, a few bytes each, would take minutes to decode."""
    if opened.format not in ("JPEG", "MPO"):
        return
    scans = _scans(source if isinstance(source, bytes) else source.read_bytes())
    if scans > _MOST_SCANS:
        raise InputError(f"{name} is a JPEG of {scans:,} scans; expected {_MOST_SCANS} at most: save it again")


def _scans(jpeg: bytes) -> int:
    """How many scans a JPEG has up to its end, by its markers (ITU-T T.81, B.1)."""
    scans, at = 0, 2
    while (found := _MARKER.search(jpeg, at)) and (marker := jpeg[found.end() - 1]) != _END:
        at = found.end()
        scans += marker == _SCAN
        if marker not in _WITHOUT_LENGTH:
            at += int.from_bytes(jpeg[at : at + 2])
    return scans


def _is_grey(picture: Image.Image) -> bool:
    if picture.mode in ("1", "L", "LA"):
        return True
    pixels = np.asarray(picture.convert("RGB"))
    return bool((pixels == pixels[:, :, :1]).all())
