"""Images of the user's: what likelihood, denoise, evaluate and report take, and what they say to the rest."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tarflow.cli.images import read_images
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.errors import InputError
from tarflow.runtime.flow import Flow
from tarflow.serve.picture import open_picture

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
        read_images(tmp_path / "x.npy", CONFIG, None)


def test_pictures_of_another_size_are_resized_as_a_server_does_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 18, 3)).astype(np.uint8)
    for name, picture in {"a": noise, "b": noise[::-1], "c": noise[:8, :8]}.items():
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    found = read_images(tmp_path, CONFIG, None).pixels
    for place, name in enumerate("abc"):
        of_server = open_picture((tmp_path / f"{name}.png").read_bytes(), 3, 8)
        assert np.array_equal(found[place], of_server.pixels)
    error = capsys.readouterr().err
    assert "2 of 3 pictures" in error
    assert "is 18x12 pixels: cropped to its middle 12x12, resized to 8x8" in error


def test_one_picture_is_a_folder_of_one(tarflow: Cli) -> None:
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save("one.png")
    Path("folder").mkdir()
    Path("folder/one.png").write_bytes(Path("one.png").read_bytes())
    (one, same) = (json.loads(tarflow("likelihood", DEMO, x, "--json").stdout) for x in ("one.png", "folder"))
    assert one["names"] == same["names"] == ["one.png"]
    assert one["bits_per_dim"] == same["bits_per_dim"]
    refused(tarflow("likelihood", DEMO, "two.png"), 2, "no images at 'two.png'; expected a picture, a folder")


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
        sentence = {"-1,1": "", "0,1": "--range 0,1 or --range -1,1", "0,255": "is an array up to"}[values]
        assert (asked.returncode, asked.stderr.count("\n")) == ((2, 1) if sentence else (0, 0))
        assert sentence in asked.stderr
    for arguments in (["evaluate", DEMO, "--samples", "x.npy"], ["report", DEMO, "--data", "x.npy", "--n", "2"]):
        done = cli(*arguments, cwd=tmp_path)
        assert (done.returncode, "is an array up to 2" in done.stderr) == (2, True), done.stderr
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
        with pytest.raises(InputError, match=r"`images` is an array up to 248; expected floats in \[-1, 1\]"):
            method(pixels.astype(np.float32))
        with pytest.raises(InputError, match="`range` is "):
            method(pixels / 255, range=(0, 2))
    assert np.isfinite(flow.encode(extreme(64)[:1] * 0 + 9, range=(-1, 1))[0]).all()


def test_a_warning_points_at_the_line_of_whoever_called() -> None:
    flow, images = Flow.open(DEMO), np.full((1, 1, 8, 8), 0.5, np.float32)
    for method in (flow.encode, flow.denoise, flow.log_likelihood, flow.bits_per_dim, flow.classify):
        with pytest.warns(UserWarning, match="none above 1") as warned:
            method(images)
        assert [found.filename for found in warned] == [__file__], method


@pytest.mark.parametrize(
    ("span", "inside", "outside"), [((0, 1), (-0.4, 1.4), (-0.6, 1.6)), ((0, 255), (-90, 380), (-150, 400))]
)
def test_floats_may_leave_the_range_they_are_said_to_be_in_by_half_its_width(
    span: tuple[int, int], inside: tuple[float, float], outside: tuple[float, float]
) -> None:
    flow, images = Flow.open(DEMO), np.full((2, 1, 8, 8), span[1] / 2, np.float32)
    for value in inside:
        images[1, 0, 2, 3] = value
        assert flow.encode(images, range=span)[0].shape[0] == 2
    for value in outside:
        images[1, 0, 2, 3] = value
        for method in (flow.encode, flow.denoise, flow.log_likelihood, flow.bits_per_dim, flow.classify):
            with pytest.raises(InputError, match=f"expected floats in .{span[0]}, {span[1]}., the `range`") as refused:
                method(images, range=span)
            assert f"{value:g}" in str(refused.value.found)


def test_a_model_without_gaussian_noise_is_not_denoised() -> None:
    opened = Flow.open(DEMO)
    manifest = replace(opened.bundle.manifest, config=replace(opened.config, noise_std=None))
    flow = Flow(replace(opened.bundle, manifest=manifest), opened.backend)
    with pytest.raises(InputError, match="uniform dequantisation"):
        flow.denoise(np.zeros((1, 1, 8, 8), np.float32))
    with pytest.raises(InputError, match="uniform dequantisation"):
        flow.sample(1, denoise=True)


def test_the_commands_refuse_in_one_sentence_and_write_nothing(tarflow: Cli, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((2, 1, 8, 8), -0.5, np.float32))
    np.save(tmp_path / "y.npy", np.zeros(3, np.int64))
    for line, message in (
        ("likelihood {} x.npy --labels y.npy", "expected 2 integers"),
        ("likelihood {} x.npy --labels 10", "classes 0 to 9"),
        ("likelihood {} x.npy --labels -2", "label -2 is out of range"),
        ("likelihood {} x.npy --save no/z.npz", "mkdir -p"),
        ("denoise {} x.npy --save no/z.npy", "mkdir -p"),
        ("denoise {} x.npy --strength nan", "--strength is nan"),
    ):
        assert refused(tarflow(*line.format(DEMO).split()), 2, message).count("\n") == 1
