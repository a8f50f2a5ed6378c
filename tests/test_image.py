"""Patches are PyTorch's unfold; pictures say what they show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tarflow.runtime.errors import InputError
from tarflow.runtime.image import grid, patchify, to_uint8, unpatchify, write_picture, write_png

sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_patchify_is_unfold_and_unpatchify_its_inverse(size: tuple[int, int, int, int]) -> None:
    n, channels, side, patch = size
    images = np.random.default_rng(0).normal(size=(n, channels, side * patch, side * patch)).astype(np.float32)
    patches = patchify(images, patch)
    unfolded = torch.nn.functional.unfold(torch.from_numpy(images), patch, stride=patch).transpose(1, 2)
    assert np.array_equal(patches, unfolded.numpy())
    assert np.array_equal(unpatchify(patches, patch, channels), images)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_any_float_becomes_a_pixel(values: list[float]) -> None:
    pixels = to_uint8(np.array(values, np.float32))
    for value, pixel in zip(values, pixels, strict=True):
        if value != value or value <= -1:
            assert pixel == 0
        elif value >= 1:
            assert pixel == 255
        else:
            assert abs(float(pixel) - (value + 1) * 127.5) <= 0.51


@pytest.mark.parametrize("n", [1, 5, 9, 10])
def test_a_grid_shows_every_image_in_reading_order(n: int) -> None:
    images = np.stack([np.full((1, 2, 2), i / 10 - 1, np.float32) for i in range(n)])
    canvas = grid(images, gap=1)
    columns = int(np.ceil(np.sqrt(n)))
    for i in range(n):
        assert canvas[1 + 3 * (i // columns), 1 + 3 * (i % columns), 0] == to_uint8(images[i])[0, 0, 0]
    assert (canvas[::3] == 255).all()
    assert (grid(images, columns=n, gap=1, background=64)[[0, -1]] == 64).all()


def test_a_picture_carries_text_and_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    write_png(path, np.zeros((2, 3, 3), np.uint8), {"seed": "7"}, zoom=2)
    with Image.open(path) as picture:
        assert picture.size == (6, 4)
        assert picture.text["seed"] == "7"  # type: ignore[attr-defined]  # of PNG images only
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def described(picture: Image.Image) -> dict[str, str]:
    """What a picture says of itself, wherever its format has room for that."""
    if picture.format == "PNG":
        return dict(picture.text)  # type: ignore[attr-defined]  # of PNG images only
    return dict(line.split(": ") for line in picture.getexif()[0x010E].split("\n"))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("name", "form", "most"), [("a.png", "PNG", 0), ("a.jpg", "JPEG", 6), ("a.JPEG", "JPEG", 6), ("a.webp", "WEBP", 0)]
)
def test_the_suffix_decides_what_a_picture_is(name: str, form: str, most: int, channels: int, tmp_path: Path) -> None:
    """``most`` is how far a shade may be off: JPEG loses something."""
    canvas = np.full((8, 16, channels), 255, np.uint8)
    canvas[:, :8, :3] = 40
    write_picture(tmp_path / name, canvas, {"seed": "7", "sample_indices": "0-3"}, zoom=2)
    with Image.open(tmp_path / name) as picture:
        assert (picture.format, picture.size) == (form, (32, 16))
        assert described(picture) == {"seed": "7", "sample_indices": "0-3"}
        shown = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(shown[::2, ::2] - canvas[:, :, [0, 0, 0] if channels < 3 else [0, 1, 2]]).max() <= most
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.gif", "a", ".png", "a.png.bak"])
def test_another_suffix_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ending in \.png, \.jpg, \.jpeg or \.webp") as refused:
        write_picture(tmp_path / name, np.zeros((2, 3, 3), np.uint8), {})
    assert f"'{tmp_path / name}'" in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_more_pixels_than_a_format_holds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="16384x2 pixels; expected 16,383 a side"):
        write_picture(tmp_path / "a.webp", np.zeros((2, 16384, 1), np.uint8), {})
    assert not list(tmp_path.iterdir())
