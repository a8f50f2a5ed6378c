"""Data: what is read, what is refused, and that every draw depends on its place in the stream alone."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tarflow.runtime.errors import InputError, MachineError
from tarflow.train.data import Split, digits, folder
from tarflow.train.stream import Stream, noisy, shift

CPU = torch.device("cpu")


def picture(path: Path, value: int = 100, size: tuple[int, int] = (12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def a_split(count: int = 10) -> Split:
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 4, 4), np.uint8)
    return Split(pixels, np.arange(count))


def test_digits_hold_out_every_sixth() -> None:
    from sklearn.datasets import load_digits

    data = digits()
    raw = load_digits()
    assert (len(data.train), len(data.held_out)) == (1498, 299)
    assert data.train.images.shape[1:] == (1, 8, 8)
    assert data.train.images.dtype == np.uint8
    assert data.train.images.max() == 255
    assert data.held_out.labels is not None
    np.testing.assert_array_equal(data.held_out.labels, raw.target[5::6])
    np.testing.assert_array_equal(data.held_out.images[:, 0], np.round(raw.images[5::6] * 255 / 16))


def test_folder_with_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, value in (("b-dogs", 200), ("a-cats", 50)):
        for i in range(2):
            picture(tmp_path / name / f"{i}.png", value)
    (tmp_path / ".cache").mkdir()
    data = folder(tmp_path, 4)
    assert data.classes == ("a-cats", "b-dogs")
    assert data.train.labels is not None
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert data.train.images.shape == (4, 3, 4, 4)
    assert data.train.images[:, 0, 0, 0].tolist() == [50, 50, 200, 200]
    assert not len(data.held_out)


def test_flat_folder_is_unconditional_and_can_hold_out(tmp_path: Path) -> None:
    for i in range(6):
        picture(tmp_path / f"{i}.png", 10 * i)
    data = folder(tmp_path, 4, channels=1, hold_out=3)
    assert data.train.labels is None
    assert data.classes == ()
    assert data.held_out.images[:, 0, 0, 0].tolist() == [20, 50]
    assert len(data.train) == 4


def test_a_folder_is_refused_where_it_would_make_a_wrong_training_set(tmp_path: Path) -> None:
    picture(tmp_path / "0.png")
    for wrong, message in (
        ({"size": 0}, "`image_size` is 0"),
        ({"channels": 2}, "`channels` is 2"),
        ({"hold_out": 1}, "`hold_out` is 1"),
        ({"hold_out": -1}, "`hold_out` is -1"),
    ):
        with pytest.raises(InputError, match=message):
            folder(tmp_path, **{"size": 8} | wrong)


def test_pictures_are_put_on_white_and_turned_upright(tmp_path: Path) -> None:
    pixels, exif = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8), Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.png", exif=exif)
    (tmp_path / "b.heic").touch()
    white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    upright = white.transpose(Image.Transpose.ROTATE_270).convert("RGB")
    expected = np.asarray(ImageOps.fit(upright, (8, 8), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    data = folder(tmp_path, 8)
    assert np.array_equal(data.train.images[0], expected)
    assert data.fingerprint() == f"{tmp_path.name}: 1 images, crc32 {zlib.crc32(expected.tobytes()):08x}"
    assert data.notes == (f"left out of '{tmp_path}': 1 .heic",)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MachineError, match=r"pip install 'tarflow\[train\]'") as caught:
        digits()
    assert caught.value.exit_code == 3


def test_fingerprint_tells_data_apart() -> None:
    data = digits()
    assert data.train.labels is not None
    before = data.fingerprint()
    data.train.labels[0] += 1
    assert data.fingerprint() != before


def test_uniform_dequantisation_fills_each_level_and_no_more() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).repeat(500, 1)
    x = noisy(images, None, [(0, i) for i in range(500)])
    assert x.min() >= -1
    assert x.max() < 1 + 1e-6
    levels = torch.floor((x.double() + 1) * 128)
    assert (levels[:, 0] == 0).all()
    assert ((levels[:, 1] == 255) | (x[:, 1] == 1)).all()
    assert ((x[:, 0] + 1) * 128).mean() == pytest.approx(0.5, abs=0.05)


def test_gaussian_noise_has_the_given_deviation() -> None:
    images = torch.full((64, 1, 16, 16), 255, dtype=torch.uint8)
    noise = noisy(images, 0.1, [(0, i) for i in range(64)]) - 1
    assert noise.std() == pytest.approx(0.1, rel=0.03)
    assert noise.mean() == pytest.approx(0, abs=3e-3)
    assert not torch.equal(noise[0], noise[1])


def test_stream_shows_every_image_once_an_epoch_in_a_new_order() -> None:
    stream = Stream(a_split(), 0.1, seed=3)
    first, second = stream.order(0, 10), stream.order(10, 10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    assert stream.order(7, 6).tolist() == [*first[7:], *second[:3]]


@given(start=st.integers(0, 10**6), count=st.integers(1, 40), size=st.integers(1, 12), seed=st.integers(0, 9))
def test_any_piece_of_the_stream_is_its_single_places(start: int, count: int, size: int, seed: int) -> None:
    stream = Stream(a_split(size), None, seed)
    assert stream.order(start, count).tolist() == [stream.order(start + i, 1)[0] for i in range(count)]


def test_stream_is_the_same_however_it_is_cut() -> None:
    def stream() -> Stream:
        return Stream(a_split(), 0.1, seed=3, drop_label=0.5, flip=True, jitter=0.5)

    images, labels = stream().batch(8, 6, CPU)
    parts = [stream().batch(start, 2, CPU) for start in (8, 10, 12)]
    assert labels is not None
    assert torch.equal(images, torch.cat([part[0] for part in parts]))
    assert torch.equal(labels, torch.cat([part[1] for part in parts if part[1] is not None]))


def test_dropped_labels_are_null_at_the_given_rate() -> None:
    _, labels = Stream(a_split(), 0.1, seed=0, drop_label=0.25).batch(0, 2000, CPU)
    assert labels is not None
    assert ((labels >= -1) & (labels < 10)).all()
    assert (labels == -1).float().mean() == pytest.approx(0.25, abs=0.04)


def test_labels_stay_with_their_images() -> None:
    images, labels = Stream(a_split(), 0.0, seed=0).batch(0, 25, CPU)
    assert labels is not None
    assert torch.equal(((images[:, 0, 0, 0] + 1) * 127.5).round().long(), labels)


def test_flip_mirrors_about_half() -> None:
    pixels = np.zeros((1, 1, 2, 2), np.uint8)
    pixels[..., 0] = 255
    images, labels = Stream(Split(pixels, None), 0.0, seed=0, flip=True).batch(0, 400, CPU)
    assert labels is None
    assert (images[:, 0, 0, 1] > 0).float().mean() == pytest.approx(0.5, abs=0.1)


def test_shift_moves_right_and_down_by_fractions_too() -> None:
    ramp = torch.arange(0, 160, 20, dtype=torch.uint8).expand(2, 1, 8, 8).contiguous()
    moved = shift(ramp, torch.tensor([[1.0, 0.0], [0.25, 1.0]]))
    assert moved[0, 0, 0].tolist() == [0, 0, 20, 40, 60, 80, 100, 120]
    assert moved[1, 0, 0, 2:6].tolist() == pytest.approx([35, 55, 75, 95], abs=1)  # bicubic bends a ramp a little
    assert torch.equal(shift(ramp.mT, torch.tensor([[0.0, 1.0]]).expand(2, 2))[0].mT, moved[0])


def test_jitter_moves_no_further_than_asked() -> None:
    pixels = np.zeros((1, 1, 8, 8), np.uint8)
    pixels[..., 2:6, 2:6] = 200
    images, _ = Stream(Split(pixels, None), 0.0, seed=0, jitter=0.25).batch(0, 50, CPU)
    column = ((images + 1) * 127.5)[:, 0, 3:5, 2].mean(1)
    assert 135 < column.min() < 170  # a quarter to the right of 200
    assert column.max() > 195
