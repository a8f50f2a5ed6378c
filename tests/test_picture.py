"""One reader of pictures: what it does to them and says so, what it refuses; and what a folder of them holds."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tarflow.runtime.errors import InputError
from tarflow.runtime.image import read_folder
from tarflow.runtime.picture import PictureReader
from tarflow.runtime.picture_folder import list_classes, list_pictures

READER = PictureReader(3, 8)
NOISE = np.random.default_rng(0).integers(0, 256, (30, 40, 4), np.uint8)


def encoded(picture: Image.Image, kind: str = "PNG", turned: int | None = None) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    if turned:
        exif[0x0112] = turned
    picture.save(file, kind, exif=exif)
    return file.getvalue()


def claiming(side: int) -> bytes:
    """A PNG whose header says side x side pixels; there are few."""
    good = encoded(Image.new("RGB", (8, 8)))
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return good[:12] + header + zlib.crc32(header).to_bytes(4, "big") + good[33:]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("turned", [None, 1, 6])
def test_a_picture_is_turned_cropped_and_resized_as_pillow_does_it(channels: int, turned: int | None) -> None:
    data = encoded(Image.fromarray(NOISE[..., :3]), "PNG", turned)
    plain = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("L" if channels == 1 else "RGB")
    expected = np.asarray(ImageOps.fit(plain, (8, 8), Image.Resampling.BICUBIC)).reshape(8, 8, channels)
    found = PictureReader(channels, 8).read(data)
    assert np.array_equal(found.pixels, expected.transpose(2, 0, 1))
    assert list(found.notes) == [
        *(["turned upright, as its EXIF data says"] if turned == 6 else []),
        *(["colours became shades of gray"] if channels == 1 else []),
        f"the picture is {'30x40' if turned == 6 else '40x30'} pixels: cropped to its middle 30x30, resized to 8x8",
    ]
    lying = PictureReader(channels, 8, upright=False).read(data)
    assert np.array_equal(lying.pixels, found.pixels) == (turned != 6)


def test_an_orientation_that_is_no_number_turns_nothing() -> None:
    file = io.BytesIO()
    exif = b"Exif\0\0MM\0*" + struct.pack(">IHHHI4sI", 8, 1, 0x0112, 2, 2, b"6", 0)
    Image.fromarray(NOISE[:8, :8, :3]).save(file, "JPEG", exif=exif)
    assert READER.read(file.getvalue()).notes == ()


def test_transparent_parts_are_put_on_white_or_their_colour_shows() -> None:
    pixels = NOISE[:8, :8].copy()
    pixels[:4, :, 3], pixels[4:, :, 3] = 0, 255
    data = encoded(Image.fromarray(pixels))
    on_white, bare = READER.read(data), PictureReader(3, 8, on_white=False).read(data)
    assert on_white.notes == ("transparent parts were put on white",)
    assert (on_white.pixels[:, :4] == 255).all()
    assert np.array_equal(on_white.pixels[:, 4:], pixels[4:, :, :3].transpose(2, 0, 1))
    assert bare.notes == ()
    assert np.array_equal(bare.pixels, pixels[..., :3].transpose(2, 0, 1))


def test_a_picture_as_the_model_wants_it_is_taken_as_it_is() -> None:
    for mode, channels in (("L", 1), ("RGB", 3), ("1", 1)):
        picture = Image.fromarray(NOISE[:8, :8, :3]).convert(mode)
        found = PictureReader(channels, 8, fit=False).read(encoded(picture))
        assert found.notes == ()
        assert np.array_equal(found.pixels[0], np.asarray(picture.convert("RGB"))[..., 0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read as an image"),
        (b"hello", "cannot be read as an image"),
        (encoded(Image.fromarray(NOISE))[:900], "cannot be read as an image"),
        (encoded(Image.fromarray(NOISE))[:60] + bytes(999), "cannot be read as an image"),
        (claiming(30_000), "cannot be read as an image"),  # more than Pillow dares
        (encoded(Image.fromarray(np.full((8, 8), 300, np.uint16))), "more than 8 bits a channel"),
        (encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "more than 8 bits a channel"),
    ],
    ids=["empty", "text", "truncated", "broken", "gigantic", "16 bits", "floats"],
)
def test_what_is_no_picture_is_refused_by_name(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^the picture .*{message}"):
        READER.read(data)
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=rf"^'.*/a\.png' .*{message}.*; "):
        READER.read(tmp_path / "a.png")


def test_a_reader_refuses_what_it_was_told_to() -> None:
    picture = Image.new("L", (9, 8))
    with pytest.raises(InputError, match="9x8 pixels; this model takes 8x8: resize it"):
        PictureReader(1, 8, fit=False).read(encoded(picture))
    with pytest.raises(InputError, match="expected a whole PNG or JPEG file"):
        PictureReader(1, 8, formats=("PNG", "JPEG")).read(encoded(picture, "GIF"))
    with pytest.raises(InputError, match="5000x5000 pixels; expected 16,777,216 at most"):
        PictureReader(1, 8, most_pixels=1 << 24).read(claiming(5000))
    with pytest.raises(InputError, match="this model has 4"):
        PictureReader(4, 8)


def fill(root: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(root / name)


def test_a_folder_is_every_picture_in_it_in_the_order_of_names(tmp_path: Path) -> None:
    fill(tmp_path, "b.png", "a.PNG", "deep/er/c.jpg", ".hidden.png")
    (tmp_path / "notes.txt").write_text("no picture")
    images, names = read_folder(tmp_path, 1, 8)
    assert names == list_pictures(tmp_path).names == [".hidden.png", "a.PNG", "b.png", "deep/er/c.jpg"]
    assert images[:3, 0, 0, 0].tolist() == [3, 1, 0]
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"c\.png"):
        read_folder(tmp_path, 1, 8)
    fill(tmp_path / "many", *(f"{7 * i % 30:02}.png" for i in range(30)))
    assert list_pictures(tmp_path / "many").names == [f"{i:02}.png" for i in range(30)]


def test_sub_folders_are_classes_without_what_is_hidden(tmp_path: Path) -> None:
    fill(tmp_path, "dogs/1.png", "dogs/more/0.png", "dogs/._1.png", "cats/x.png", ".cache/y.png")
    found = list_classes(tmp_path)
    assert found.classes == ("cats", "dogs")
    assert found.names == ["cats/x.png", "dogs/1.png", "dogs/more/0.png"]
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 1]
    assert list_classes(tmp_path / "cats").labels is None


def test_a_folder_that_would_be_read_wrongly_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder at"):
        list_classes(tmp_path / "nowhere")
    for read in (list_classes, list_pictures):
        with pytest.raises(InputError, match=r"no images in .*; expected files ending in \.png"):
            read(tmp_path)
    fill(tmp_path, "cats/x.png")
    (tmp_path / "dogs").mkdir()
    with pytest.raises(InputError, match=r"no images in .*dogs"):
        list_classes(tmp_path)
    fill(tmp_path, "dogs/x.png", "stray.png")
    with pytest.raises(InputError, match=r"such as 'stray\.png'; expected either"):
        list_classes(tmp_path)
