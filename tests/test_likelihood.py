"""Images of the user's: what likelihood, denoise, evaluate and report take, and what they say to the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tarflow.cli.images import as_trained_on, read_images
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.errors import InputError
from tarflow.runtime.flow import Flow

from .conftest import DEMO, Cli

CONFIG = replace(Bundle.open(DEMO).manifest.config, channels=3)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3, 16, 16), np.float32),
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((2, 3, 9, 8), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((3, 8, 8), np.float32),
        np.zeros((0, 3, 8, 8), np.float32),
        np.zeros((0, 3, 8, 8), np.uint8),
        np.float32(0),
        np.uint8(0),
        np.zeros((2, 3, 8, 8), np.int64),
        np.zeros((2, 3, 8, 8), np.uint16),
        np.zeros((2, 3, 8, 8), np.complex64),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_an_array_that_is_no_images_of_this_model_is_refused(array: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError, match=r"x\.npy' holds .*; expected \(N, 3, 8, 8\), uint8 or floats") as refused:
        read_images(tmp_path / "x.npy", CONFIG, None)
    assert f"{array.dtype} of shape {array.shape}" in str(refused.value)


def test_images_are_a_folder_or_an_array_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_text("text")
    Image.new("RGB", (9, 8)).save(tmp_path / "a.png")
    for name, message in (
        ("nowhere", "no images at"),
        ("a.npy", "not an .npy array"),
        (".", "a.png' is 9x8 pixels; this model takes 8x8"),
    ):
        with pytest.raises(InputError, match=message):
            read_images(tmp_path / name, CONFIG, None)


def test_bytes_get_the_noise_of_training_and_floats_are_taken_as_they_are() -> None:
    flow = Flow.open(DEMO)
    stored = np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8), np.uint8)
    floats = stored / np.float32(127.5) - 1
    assert as_trained_on(flow, floats, 5) is floats
    assert np.array_equal(as_trained_on(flow, stored, 5), flow.dequantise(stored, 5))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_images_that_are_not_finite_are_neither_encoded_nor_denoised(value: float) -> None:
    flow, images = Flow.open(DEMO), np.zeros((3, 1, 8, 8))
    images[1, 0, 2, 3] = value
    for method in (flow.encode, flow.denoise):
        with pytest.raises(InputError, match="1 of 3 samples in `images` are not finite, the first at row 1"):
            method(images)


def extreme(count: int = 64) -> Any:
    """Images that a picture may just be, of which the demo's encoding overflows for most."""
    return np.random.default_rng(0).choice([-8, 8], (count, 1, 8, 8)).astype(np.float32)


@pytest.mark.parametrize(("command", "result"), [("likelihood", "bits_per_dim"), ("denoise", "rms_change")])
def test_what_comes_to_nothing_is_listed_and_no_success(cli: Cli, tmp_path: Path, command: str, result: str) -> None:
    np.save(tmp_path / "x.npy", extreme())
    flow = Flow.open(DEMO)
    found = flow.bits_per_dim(extreme()) if command == "likelihood" else flow.denoise(extreme())
    broken = np.flatnonzero(~np.isfinite(found.reshape(64, -1)).all(1)).tolist()
    assert 0 < len(broken) < 64, "some must overflow and some not, or this test shows nothing"
    done = cli(command, DEMO, "x.npy", "--json", "--save", "out.npz", cwd=tmp_path)
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document["nonfinite"] == broken
    assert result in document
    assert (tmp_path / "out.npz").exists()
    assert f"check failed: {len(broken)} of 64 images" in done.stderr
    assert f"{broken[0]}, {broken[1]}" in done.stderr


def test_floats_of_another_range_are_refused_or_asked_about(cli: Cli, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8), np.uint8)
    images = {"-1,1": pixels / 127.5 - 1, "0,1": pixels / 255, "0,255": pixels.astype(np.float64)}
    expected = Flow.open(DEMO).bits_per_dim(images["-1,1"]).tolist()
    for values, array in images.items():
        np.save(tmp_path / "x.npy", array)
        done = cli("likelihood", DEMO, "x.npy", "--range", values, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["bits_per_dim"] == pytest.approx(expected, abs=1e-4)
        asked = cli("denoise", DEMO, "x.npy", "--save", "y.npy", cwd=tmp_path)
        sentence = {"-1,1": "", "0,1": "--range 0,1 or --range -1,1", "0,255": "of values up to"}[values]
        assert (asked.returncode, asked.stderr.count("\n")) == ((2, 1) if sentence else (0, 0))
        assert sentence in asked.stderr
    for arguments in (["evaluate", DEMO, "--samples", "x.npy"], ["report", DEMO, "--data", "x.npy", "--n", "2"]):
        done = cli(*arguments, cwd=tmp_path)
        assert (done.returncode, "of values up to 2" in done.stderr) == (2, True), done.stderr
    done = cli("likelihood", DEMO, "x.npy", "--range", "1,2", cwd=tmp_path)
    assert (done.returncode, "--range is '1,2'; expected -1,1, 0,1, 0,255" in done.stderr) == (2, True), done.stderr


def test_python_takes_a_range_warns_where_it_may_be_another_and_refuses_what_is_no_picture() -> None:
    flow, pixels = Flow.open(DEMO), np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8), np.uint8)
    expected = flow.denoise(pixels / 127.5 - 1)
    for span, array in (((0, 1), pixels / 255), ((0, 255), pixels.astype(np.float32)), ((-1, 1), pixels / 127.5 - 1)):
        np.testing.assert_allclose(flow.denoise(array, range=span), expected, atol=1e-4)
    with pytest.warns(UserWarning, match=r"none above 1: taken as images in \[-1, 1\]"):
        flow.log_likelihood(pixels / 255)
    for method in (flow.encode, flow.denoise, flow.log_likelihood, flow.bits_per_dim):
        with pytest.raises(InputError, match=r"`images` is of values up to 248; expected floats in \[-1, 1\]"):
            method(pixels.astype(np.float32))
        with pytest.raises(InputError, match="`range` is "):
            method(pixels / 255, range=(0, 2))
    assert np.isfinite(flow.encode(extreme(64)[:1] * 0 + 9, range=(-1, 1))[0]).all()


def test_a_model_without_gaussian_noise_is_not_denoised() -> None:
    opened = Flow.open(DEMO)
    manifest = replace(opened.bundle.manifest, config=replace(opened.config, noise_std=None))
    flow = Flow(replace(opened.bundle, manifest=manifest), opened.backend)
    with pytest.raises(InputError, match="uniform dequantisation"):
        flow.denoise(np.zeros((1, 1, 8, 8), np.float32))
    with pytest.raises(InputError, match="uniform dequantisation"):
        flow.sample(1, denoise=True)


def test_the_commands_refuse_in_one_sentence_and_write_nothing(cli: Cli, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((2, 1, 8, 8), -0.5, np.float32))
    np.save(tmp_path / "y.npy", np.zeros(3, np.int64))
    before = sorted(tmp_path.iterdir())
    for arguments, message in (
        (["likelihood", DEMO, "x.npy", "--labels", "y.npy"], "expected 2 integers"),
        (["likelihood", DEMO, "x.npy", "--labels", "10"], "classes 0 to 9"),
        (["likelihood", DEMO, "x.npy", "--save", "no/z.npz"], "mkdir -p"),
        (["denoise", DEMO, "x.npy", "--save", "no/z.npy"], "mkdir -p"),
        (["denoise", DEMO, "x.npy", "--strength", "nan"], "--strength is nan"),
    ):
        done = cli(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert message in done.stderr
    assert sorted(tmp_path.iterdir()) == before
