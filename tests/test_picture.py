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
from tarflow.runtime.picture_folder import list_pictures

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


def test_an_orientation_that_is_no_number_turns_nothing() -> None:
    file = io.BytesIO()
    exif = b"Exif\0\0MM\0*" + struct.pack(">IHHHI4sI", 8, 1, 0x0112, 2, 2, b"6", 0)
    Image.fromarray(NOISE[:8, :8, :3]).save(file, "JPEG", exif=exif)
    assert READER.read(file.getvalue()).notes == ()


def clear_above(mode: str) -> Image.Image:
    """A picture 8x8 whose upper half is transparent, and of some colour below."""
    pixels = NOISE[:8, :8].copy()
    pixels[:4, :, 3], pixels[4:, :, 3] = 0, 255
    picture = Image.fromarray(pixels)
    if mode != "P":
        return picture.convert(mode)
    palette = Image.fromarray(np.repeat(np.array([[0], [1]], np.uint8), 4, 0) * np.ones((1, 8), np.uint8), "P")
    palette.putpalette([200, 0, 90, 10, 20, 30])
    palette.info["transparency"] = 0
    return palette


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_put_on_white(mode: str) -> None:
    picture = clear_above(mode)
    found = READER.read(encoded(picture))
    assert "transparent parts were put on white" in found.notes
    assert (found.pixels[:, :4] == 255).all()
    assert np.array_equal(found.pixels[:, 4:], np.asarray(picture.convert("RGB"))[4:].transpose(2, 0, 1))


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
        (claiming(8200), "8200x8200 pixels; expected 67,108,864 at most"),
        (claiming(30_000), "cannot be read as an image"),  # more than Pillow dares
        (encoded(Image.fromarray(np.full((8, 8), 300, np.uint16))), "more than 8 bits a channel"),
        (encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "more than 8 bits a channel"),
    ],
    ids=["empty", "text", "truncated", "broken", "large", "gigantic", "16 bits", "floats"],
)
def test_what_is_no_picture_is_refused_by_name(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^the picture .*{message}"):
        READER.read(data)
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=rf"^'.*/a\.png' .*{message}.*[;:] "):
        READER.read(tmp_path / "a.png")


def test_a_reader_refuses_what_it_was_told_to() -> None:
    picture = Image.new("L", (9, 8))
    with pytest.raises(InputError, match="9x8 pixels; this model takes 8x8: resize it"):
        PictureReader(1, 8, fit=False).read(encoded(picture))
    with pytest.raises(InputError, match="expected a whole PNG or JPEG file"):
        PictureReader(1, 8, formats=("PNG", "JPEG")).read(encoded(picture, "GIF"))
    with pytest.raises(InputError, match=r"expected a whole PNG, JPEG, .* or PPM file"):
        READER.read(encoded(picture, "SGI"))
    with pytest.raises(InputError, match="5000x5000 pixels; expected 16,777,216 at most"):
        PictureReader(1, 8, most_pixels=1 << 24).read(claiming(5000))
    with pytest.raises(InputError, match="this model has 4"):
        PictureReader(4, 8)


def with_exif(entries: list[tuple[int, int, int, bytes]], data: bytes = b"") -> bytes:
    """A JPEG 8x8 that is to be turned by its EXIF, which holds (tag, type, count, value or offset) besides."""
    entries = sorted([(0x0112, 3, 1, struct.pack("<HH", 6, 0)), *entries])
    table = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + table + bytes(4) + data
    file = io.BytesIO()
    Image.fromarray(NOISE[:8, :8, :3]).save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    "entry",
    [
        (0x011A, 2, 4, b"abc\0"),  # text where a fraction belongs
        (0x0103, 8, 1, struct.pack("<hh", -5, 0)),  # a negative number where none can be written
        (0x0100, 9, 1, struct.pack("<i", -5)),
    ],
)
def test_what_pillow_fails_to_turn_is_the_pictures_fault(entry: tuple[int, int, int, bytes], tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(with_exif([entry]))
    with pytest.raises(InputError, match=r"^'.*/a\.jpg' cannot be read as an image \(.*\); expected a whole PNG"):
        READER.read(tmp_path / "a.jpg")


@pytest.mark.filterwarnings("ignore:.*(corrupt EXIF|Tag data)")
def test_other_nonsense_in_exif_turns_a_picture_all_the_same() -> None:
    for entry, data in (
        ((0x9204, 10, 1, struct.pack("<I", 38)), struct.pack("<ii", -1, 0)),  # -1 / 0
        ((0x9286, 7, 0x7FFFFFFF, struct.pack("<I", 26)), b""),  # more bytes than there are
        ((0x9999, 200, 1, bytes(4)), b""),  # a type that is none
    ):
        assert READER.read(with_exif([entry], data)).notes == ("turned upright, as its EXIF data says",)


def test_an_exception_of_any_kind_is_told_with_the_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.new("L", (8, 8))))
    for kind in (TypeError, KeyError, struct.error, ZeroDivisionError, AssertionError, RecursionError, MemoryError):
        monkeypatch.setattr(ImageOps, "exif_transpose", lambda picture, kind=kind: (_ for _ in ()).throw(kind("no")))
        with pytest.raises(InputError, match=r"a\.png' cannot be read as an image"):
            READER.read(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_several_frames_or_pages_are_refused_and_one_is_read(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (0, 120, 250)]
    for count in (1, 3):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:count])
        if count == 1:
            assert READER.read(file.getvalue()).pixels.max() <= 3
        else:
            with pytest.raises(InputError, match="several frames or pages; expected one"):
                READER.read(file.getvalue())


def test_a_photograph_with_a_smaller_copy_of_itself_is_read() -> None:
    file = io.BytesIO()
    Image.new("L", (8, 8), 90).save(file, "MPO", save_all=True, append_images=[Image.new("L", (4, 4))])
    assert (PictureReader(1, 8).read(file.getvalue()).pixels == 90).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_each_format_is_read(kind: str) -> None:
    data = encoded(Image.new("RGB", (8, 8), (250, 250, 250)), kind)
    assert (abs(READER.read(data).pixels.astype(int) - 250) <= 3).all()


def test_nothing_is_started_to_read_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pillow has Ghostscript draw PostScript, whatever the file is called."""
    ran = tmp_path / "ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho 10.0; touch '{ran}'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "cat.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match=r"cat\.png' cannot be read as an image"):
        READER.read(tmp_path / "cat.png")
    assert not ran.exists()


def many_scans(count: int) -> bytes:
    """A progressive JPEG 64x64 of one channel, of the scans that it has and of ``count`` empty ones after them."""
    file = io.BytesIO()
    Image.fromarray(np.tile(NOISE[:8, :8, 0], (8, 8))).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[last:-2] * count + whole[-2:]


def test_a_jpeg_is_refused_for_its_scans_before_any_is_decoded() -> None:
    reader = PictureReader(1, 8)
    assert reader.read(many_scans(0)).pixels.shape == (1, 8, 8)
    assert reader.read(many_scans(80)).pixels.shape == (1, 8, 8)
    with pytest.raises(InputError, match=r"a JPEG of \d+ scans; expected 100 at most"):
        reader.read(many_scans(100))
    beside = many_scans(0)  # what looks like scans in a comment is none
    comment = b"\xff\xfe" + struct.pack(">H", 1002) + b"\xff\xda" * 500
    assert reader.read(beside[:2] + comment + beside[2:]).pixels.shape == (1, 8, 8)


def fill(root: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(root / name)


def test_a_folder_is_every_picture_in_it_in_the_order_of_names(tmp_path: Path) -> None:
    fill(tmp_path, "b.png", "a.PNG", "c.jfif", "d.jpe", "e.ppm", ".hidden.png", ".ipynb_checkpoints/b.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "f.HEIC").write_text("no picture that can be read")
    (tmp_path / "README").touch()
    (tmp_path / "g.png").symlink_to("nowhere")
    (tmp_path / "h.png").symlink_to("h.png")
    found = list_pictures(tmp_path)
    images, names = read_folder(tmp_path, 1, 8)
    assert names == found.names == ["a.PNG", "b.png", "c.jfif", "d.jpe", "e.ppm"]
    assert (found.classes, found.labels) == ((), None)
    assert images[:2, 0, 0, 0].tolist() == [1, 0]
    left_out = "1 .heic, 1 .txt, 2 hidden or left by tools, 2 links to nothing, or no files, 1 without a suffix"
    assert found.notes() == [f"left out of '{tmp_path}': {left_out}"]
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"c\.png"):
        read_folder(tmp_path, 1, 8)
    fill(tmp_path / "many", *(f"{7 * i % 30:02}.png" for i in range(30)))
    assert list_pictures(tmp_path / "many").names == [f"{i:02}.png" for i in range(30)]
    assert list_pictures(tmp_path / "many").notes() == []


def test_sub_folders_are_classes_without_what_is_hidden(tmp_path: Path) -> None:
    fill(tmp_path, "dogs/1.png", "dogs/more/0.png", "dogs/._1.png", "cats/x.png", ".cache/y.png")
    fill(tmp_path, "__MACOSX/cats/._x.png", "lost+found/z.png")
    found = list_pictures(tmp_path)
    assert found.classes == ("cats", "dogs")
    assert found.names == ["cats/x.png", "dogs/1.png", "dogs/more/0.png"]
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 1]
    assert found.left_out == {"hidden or left by tools": 4}
    assert list_pictures(tmp_path / "cats").labels is None


def test_linked_folders_are_followed_once_in_a_class(tmp_path: Path) -> None:
    fill(tmp_path, "elsewhere/9.png", "data/a/0.png", "data/b/0.png")
    links = {
        "a/more": "../../elsewhere",
        "a/again": "../../elsewhere",
        "a/up": "..",
        "b/self": ".",
        "c": "../elsewhere",
    }
    for name, target in links.items():
        (tmp_path / "data" / name).symlink_to(target)
    found = list_pictures(tmp_path / "data")
    assert found.names == ["a/0.png", "a/more/9.png", "b/0.png", "c/9.png"]
    assert found.left_out == {"folders reached a second time by a link": 3}


def test_a_folder_that_would_be_read_wrongly_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder at"):
        list_pictures(tmp_path / "nowhere")
    (tmp_path / "a.avif").touch()
    with pytest.raises(InputError, match=r"no images in .*; left out: 1 \.avif; expected files ending in \.png"):
        list_pictures(tmp_path)
    fill(tmp_path, "cats/x.png")
    (tmp_path / "birds").mkdir()
    (tmp_path / "dogs").mkdir()
    (tmp_path / "dogs" / "x.heic").touch()
    with pytest.raises(InputError, match=r"no images in 'birds', 'dogs' of '.*'; left out: 1 \.avif, 1 \.heic; "):
        list_pictures(tmp_path)
    fill(tmp_path, "dogs/x.png", "stray.png")
    with pytest.raises(InputError, match=r"such as 'stray\.png'; expected either"):
        list_pictures(tmp_path)
