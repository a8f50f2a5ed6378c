"""The Frechet distance and its error, feature networks of all shapes, and tarflow evaluate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser
from PIL import Image

from tarflow.cli import evaluate
from tarflow.cli.evaluate import DIGITS
from tarflow.quality.features import FeatureNetwork, Usage
from tarflow.quality.frechet import Statistics, distance, estimate, read_statistics, write_statistics
from tarflow.runtime.errors import BundleError, InputError
from tarflow.runtime.files import sha256
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.image import to_uint8
from tarflow.runtime.request import Request
from tarflow.train.data import digits

from .conftest import DEMO, Cli, refused, said


def dice(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- the distance ---------------------------------------------------------------------------------------------------


def test_the_distance_agrees_with_another_route_to_the_square_root() -> None:
    from scipy.linalg import sqrtm

    (m1, m2), (a, b) = dice(1).normal(size=(2, 12)), dice(3).normal(size=(2, 12, 12))
    first, second = a @ a.T, b @ b.T
    spread = np.trace(first) + np.trace(second) - 2 * np.trace(sqrtm(first @ second)).real
    one, other = Statistics(m1, first, 9), Statistics(m2, second, 9)
    assert distance(one, other) == pytest.approx(np.sum((m1 - m2) ** 2) + spread, rel=1e-9)
    assert distance(one, other) == pytest.approx(distance(other, one), rel=1e-9)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_a_singular_covariance_is_no_obstacle(rank: int) -> None:
    factor = dice(4).normal(size=(20, rank))
    one = Statistics(np.zeros(20), factor @ factor.T, 9)
    assert distance(one, one) < 1e-6 * max(1.0, np.trace(one.covariance))
    scaled = Statistics(np.zeros(20), 4 * factor @ factor.T, 9)  # deviations doubled: their squared difference
    assert distance(scaled, one) == pytest.approx(np.trace(one.covariance), rel=1e-6, abs=1e-12)


def test_statistics_are_numpys_and_weights_are_repetitions() -> None:
    x = (dice(5).normal(size=(5000, 6)) + 1000).astype(np.float32)  # more than one chunk, far from 0
    found = Statistics.of(x)
    np.testing.assert_allclose(found.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-9)
    times = dice(6).integers(0, 3, len(x))
    repeated, weighted = Statistics.of(np.repeat(x, times, 0)), Statistics.of(x, times)
    np.testing.assert_allclose(weighted.covariance, repeated.covariance, rtol=1e-9, atol=1e-9)
    assert weighted.count == repeated.count == times.sum()


def test_the_bootstrap_knows_how_much_the_distance_varies_and_how_much_is_bias() -> None:
    reference = Statistics(np.zeros(4), np.eye(4), 0)
    draws = [estimate(dice(seed).normal(0.3, 1.2, (400, 4)), reference, 60, seed) for seed in range(30)]
    found = np.array([d.distance for d in draws])
    true = 4 * (0.3**2 + 0.2**2)
    assert 0.75 < np.mean([d.standard_error for d in draws]) / found.std(ddof=1) < 1.35
    assert abs(np.mean([d.distance - d.bias for d in draws]) - true) < abs(found.mean() - true) + 0.01
    assert sum(d.interval[0] < true < d.interval[1] for d in draws) >= 24
    again = estimate(dice(0).normal(0.3, 1.2, (400, 4)), reference, 60, 0)
    assert again == draws[0], "the same numbers, the same error"


def test_statistics_are_read_as_written_and_from_files_of_other_programs(tmp_path: Path) -> None:
    statistics = Statistics.of(dice(7).normal(size=(50, 3)))
    write_statistics(tmp_path / "ours.npz", statistics, "network")
    found, network = read_statistics(tmp_path / "ours.npz")
    assert network == "network"
    assert found.count == 50
    np.testing.assert_array_equal(found.covariance, statistics.covariance)
    np.savez(tmp_path / "theirs.npz", mu=statistics.mean, sigma=statistics.covariance)
    found, network = read_statistics(tmp_path / "theirs.npz")
    assert (found.count, network) == (0, None)
    assert distance(found, statistics) == pytest.approx(0, abs=1e-9)


def test_statistics_that_are_none_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros(3))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    np.savez(tmp_path / "nan.npz", mu=np.zeros(2), sigma=np.full((2, 2), np.nan))
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "text.npz").write_bytes(b"no zip")
    for name, message in (
        ("x.npz", "holds x; expected mu and sigma"),
        ("shapes.npz", r"sigma float64 \(2, 2\)"),
        ("nan.npz", "expected finite floats"),
        ("one.npy", "one array, as"),
        ("text.npz", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            read_statistics(tmp_path / name)


# --- feature networks -----------------------------------------------------------------------------------------------


def network(path: Path, images: str = "float[N, 3, H, W]", inputs: int = 1, outputs: int = 1) -> Path:
    """A network that averages all pixels of each channel: its features are the mean of what it was given."""
    given = ", ".join(f"{images} x{k}" for k in range(inputs))
    found = ", ".join(f"float[N, F] y{k}" for k in range(outputs))
    copies = "".join(f"y{k} = Identity(y0)" for k in range(1, outputs))
    axes = "1, 2" if images.endswith("3]") else "2, 3"
    text = f"""
        <ir_version: 9, opset_import: ["" : 18]> mean ({given}) => ({found}) {{
            floats = Cast<to = 1>(x0)
            axes = Constant<value_ints = [{axes}]>()
            y0 = ReduceMean<keepdims = 0>(floats, axes)
            {copies}
        }}"""
    onnx.save(parser.parse_model(text), path)
    return path


PIXELS = dice(8).integers(0, 256, (70, 3, 6, 6)).astype(np.uint8)
MEANS = PIXELS.reshape(70, 3, -1).mean(2)


@pytest.mark.parametrize(
    ("images", "values", "expected"),
    [
        ("float[N, 3, H, W]", None, MEANS / 127.5 - 1),
        ("float[N, 3, 6, 6]", "0,1", MEANS / 255),
        ("float[4, H, W, 3]", "0,255", MEANS),
        ("uint8[N, H, W, 3]", None, MEANS),
        ("float[N, 3, H, W]", "imagenet", (MEANS / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]),
    ],
)
def test_images_reach_the_network_as_it_wants_them(
    images: str, values: str | None, expected: NDArray[Any], tmp_path: Path
) -> None:
    opened = FeatureNetwork.open(network(tmp_path / "n.onnx", images), Usage(feature_range=values))
    np.testing.assert_allclose(opened(PIXELS), expected, rtol=1e-4, atol=1e-4)


def test_grey_images_are_repeated_for_a_network_of_colours_and_resized_for_a_fixed_one(tmp_path: Path) -> None:
    opened = FeatureNetwork.open(network(tmp_path / "n.onnx", "float[N, 3, 24, 24]"))
    found = opened(PIXELS[:, :1])
    assert found.shape == (70, 3)
    np.testing.assert_allclose(found[:, 0], MEANS[:, 0] / 127.5 - 1, atol=0.02)  # bicubic keeps the mean, nearly
    np.testing.assert_array_equal(found[:, 0], found[:, 2])
    assert opened.identity != FeatureNetwork.open(tmp_path / "n.onnx", Usage(feature_range="0,1")).identity


def test_weights_in_a_file_of_their_own_are_part_of_what_a_network_is(tmp_path: Path) -> None:
    model = parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 18]> linear (float[N, 3, 8, 8] images) => (float[N, 4] features) {
            flat = Flatten(images)
            features = MatMul(flat, weights)
        }""")
    weights = dice(3).normal(size=(192, 4)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weights, "weights"))
    path, data = tmp_path / "n.onnx", tmp_path / "n.onnx.data"
    onnx.save(model, path)
    assert FeatureNetwork.open(path).identity.startswith(sha256(path)), "as statistics that were made before say"
    onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=0)
    before = FeatureNetwork.open(path).identity
    data.write_bytes(data.read_bytes()[::-1])
    assert FeatureNetwork.open(path).identity != before


def test_a_network_that_cannot_be_used_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "n.onnx"
    made: dict[str, Any]
    for made, usage, message in (
        ({"inputs": 2}, Usage(), r"2 inputs .*expected one, images"),
        ({"images": "float[N, 3, 4, 4, 4]"}, Usage(), r"of shape .*expected images"),
        ({"images": "float[N, 5, 8, 8]"}, Usage(), "5 channels"),
        ({"images": "float[N, 3, 24, 24]"}, Usage(feature_size=32), "is 32; expected 24, which .* takes: leave it out"),
        ({"outputs": 2}, Usage(), r"2 outputs .*`feature_output`"),
        ({"outputs": 2}, Usage(feature_output="z"), "no output 'z'; it has y0, y1"),
    ):
        with pytest.raises(InputError, match=message):
            FeatureNetwork.open(network(path, **made), usage)
    second = FeatureNetwork.open(path, Usage(feature_output="y1"))
    np.testing.assert_allclose(second(PIXELS), MEANS / 127.5 - 1, atol=1e-4)
    with pytest.raises(InputError, match="`feature_size` is 0; expected 1 to"):
        Usage(feature_size=0)
    with pytest.raises(InputError, match="expected one of -1,1, 0,1"):
        Usage(feature_range="0,2")
    path.write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="cannot be opened as an ONNX network"):
        FeatureNetwork.open(path)


def test_the_demos_network_tells_digits_apart_and_its_statistics_are_those_of_the_digits() -> None:
    opened, data = FeatureNetwork.open(DIGITS), digits()
    features = opened(np.concatenate([data.train.images, data.held_out.images]))
    statistics, made_with = read_statistics(DIGITS.with_suffix(".npz"))
    assert made_with == opened.identity
    assert distance(Statistics.of(features), statistics) < 1e-3
    assert DIGITS.stat().st_size < 300_000
    train, held_out = features[: len(data.train)], features[len(data.train) :]
    nearest = [int(np.square(train - row).sum(1).argmin()) for row in held_out]
    assert data.train.labels is not None
    assert np.mean(data.train.labels[nearest] == data.held_out.labels) > 0.97


# --- the command ----------------------------------------------------------------------------------------------------


def test_evaluate_draws_what_generate_draws_and_statistics_stand_for_their_images(cli: Cli, tmp_path: Path) -> None:
    images = digits().held_out.images
    (tmp_path / "real").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[0]).save(tmp_path / "real" / f"{i:04}.png")
    how = ("--n", 120, "--guidance", 1, "--seed", 3, "--resamples", 20, "--json")
    found = said(cli("evaluate", DEMO, "--against", "real", "--save-stats", "real.npz", *how, cwd=tmp_path))

    drawn = Flow.open(DEMO).sample(120, labels=np.arange(120) % 10, guidance=Guidance(1.0), seed=3)
    network = FeatureNetwork.open(DIGITS)
    expected = estimate(network(to_uint8(drawn)), Statistics.of(network(images)), 20, 3)
    assert found["distance"] == pytest.approx(expected.distance, rel=1e-3)
    assert found["standard_error"] == pytest.approx(expected.standard_error, rel=1e-2)
    assert (found["count"], found["reference_images"], found["dimension"]) == (120, 299, 64)

    np.save(tmp_path / "drawn.npy", np.asarray(drawn))
    second = said(cli("evaluate", DEMO, "--against", "real.npz", "--samples", "drawn.npy", *how, cwd=tmp_path))
    assert second["distance"] == pytest.approx(expected.distance, rel=1e-6)


def test_samples_drawn_part_by_part_are_those_of_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_PART", 16)
    flow, network = Flow.open(DEMO), FeatureNetwork.open(DIGITS)
    request = Request(40, labels=(7, 2, 0), guidance=Guidance(1.0), seed=3, first_sample=5).resolved(flow.config)
    expected = network(to_uint8(flow.draw(request)))
    np.testing.assert_allclose(evaluate._draw(flow, network, request), expected, atol=0.05)


def test_evaluate_warns_of_too_few_samples_and_says_all_in_words(cli: Cli, tmp_path: Path) -> None:
    done = cli("evaluate", DEMO, "--n", 40, "--resamples", 5, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Frechet distance" in done.stdout
    assert "1797 images" in done.stdout
    assert "40 samples are no more than the 64 features" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_evaluate_says_what_is_missing_or_does_not_fit(tarflow: Cli, tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "faces")
    manifest = json.loads((DEMO / "manifest.json").read_text()) | {"name": "faces"}
    (tmp_path / "faces" / "manifest.json").write_text(json.dumps(manifest))
    np.save(tmp_path / "rgb.npy", np.zeros((4, 3, 8, 8), np.uint8))
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3), network=np.array("another"))
    (tmp_path / "no.onnx").write_text("text")
    cases: list[tuple[list[object], int, str]] = [
        (["faces"], 2, "which features? Pass --features"),
        ([DEMO, "--against", "rgb.npy"], 2, "expected (N, 1, 8, 8)"),
        ([DEMO, "--against", "other.npz"], 2, "made with another network"),
        ([DEMO, "--features", "no.onnx"], 4, "cannot be opened as an ONNX network"),
        ([DEMO, "--features", DIGITS], 2, "against what?"),
        ([DEMO, "--n", 1], 2, "--n is 1"),
        ([DEMO, "--seed", -1], 2, "--seed is -1"),
        ([DEMO, "--save-stats", "no/where.npz"], 2, "does not exist"),
    ]
    for arguments, code, message in cases:
        refused(tarflow("evaluate", *arguments), code, message)
