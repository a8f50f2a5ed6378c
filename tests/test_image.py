"""Patches are PyTorch's unfold; pictures say what they show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tarflow.runtime.image import grid, patchify, to_uint8, unpatchify, write_png

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
