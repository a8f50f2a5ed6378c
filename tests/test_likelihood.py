"""Images of the user's: what likelihood, denoise, evaluate and report take, and what they say to the rest."""

from __future__ import annotations

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
        read_images(tmp_path / "x.npy", CONFIG)
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
            read_images(tmp_path / name, CONFIG)


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


def test_a_model_without_gaussian_noise_is_not_denoised() -> None:
    opened = Flow.open(DEMO)
    manifest = replace(opened.bundle.manifest, config=replace(opened.config, noise_std=None))
    flow = Flow(replace(opened.bundle, manifest=manifest), opened.backend)
    with pytest.raises(InputError, match="uniform dequantisation"):
        flow.denoise(np.zeros((1, 1, 8, 8), np.float32))
    with pytest.raises(InputError, match="uniform dequantisation"):
        flow.sample(1, denoise=True)


def test_the_commands_refuse_in_one_sentence_and_write_nothing(cli: Cli, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 8, 8), np.float32))
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
