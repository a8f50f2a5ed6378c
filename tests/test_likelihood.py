"""Images of the user's: what likelihood, denoise, evaluate and report take, and what they say to the rest."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tarflow.cli.images import read_images
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.errors import InputError
from tarflow.runtime.flow import Flow

from .conftest import DEMO, Cli, refused

CONFIG = replace(Bundle.open(DEMO).manifest.config, channels=3)


SHAPES = ((2, 3, 16, 16), (2, 8, 8, 3), (2, 3, 9, 8), (3, 8, 8), (0, 3, 8, 8), ())
KINDS = ("int64", "uint16", "complex64")
NONE = [(shape, kind) for shape in SHAPES for kind in ("float32", "uint8")] + [((2, 3, 8, 8), kind) for kind in KINDS]


@pytest.mark.parametrize(("shape", "kind"), NONE)
def test_an_array_that_is_no_images_of_this_model_is_refused(shape: tuple[int, ...], kind: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(shape, kind))
    with pytest.raises(
        InputError, match=re.escape(f"holds {kind} of shape {shape}; expected (N, 3, 8, 8), uint8 or fl")
    ):
        read_images(tmp_path / "x.npy", CONFIG)


def test_a_picture_of_another_size_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (9, 8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png' is 9x8 pixels; this model takes 8x8"):
        read_images(tmp_path, CONFIG)


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


def test_the_commands_refuse_in_one_sentence_and_write_nothing(tarflow: Cli, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 8, 8), np.float32))
    np.save(tmp_path / "y.npy", np.zeros(3, np.int64))
    for line, message in (
        ("likelihood {} x.npy --labels y.npy", "expected 2 integers"),
        ("likelihood {} x.npy --labels 10", "classes 0 to 9"),
        ("likelihood {} x.npy --save no/z.npz", "mkdir -p"),
        ("denoise {} x.npy --save no/z.npy", "mkdir -p"),
        ("denoise {} x.npy --strength nan", "--strength is nan"),
    ):
        assert refused(tarflow(*line.format(DEMO).split()), 2, message).count("\n") == 1
