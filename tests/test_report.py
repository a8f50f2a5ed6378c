"""The report: one page that loads nothing, with the Flow's own pictures and numbers on it, whole or absent."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tarflow.quality import plots
from tarflow.quality.examine import SHOWN, examine
from tarflow.quality.report import Making, render
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.image import to_uint8
from tarflow.runtime.noise import normal
from tarflow.runtime.request import Request
from tarflow.train.data import digits

from .conftest import DEMO, Cli, largest, refused, report_of, said

Made = tuple[str, dict[str, object]]  # a page, and what the command said


class Page(HTMLParser):
    """What a browser would see: every tag with its attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def pictures(self) -> dict[str, NDArray[np.uint8]]:
        """The images' pixels (rows, columns, RGBA), by their alternative text."""
        found = {}
        for tag, attributes in self.tags:
            if tag == "img":
                kind, data = attributes["src"].split(",", 1)
                assert kind == "data:image/png;base64"
                found[attributes["alt"]] = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    held_out = digits().held_out
    assert held_out.labels is not None
    np.save(folder / "digits.npy", held_out.images[:60])
    np.save(folder / "labels.npy", held_out.labels[:60])
    return folder


@pytest.fixture(scope="module")
def report(cli: Cli, folder: Path) -> Made:
    """The page of 40 guided samples beside 60 digits, and what the command said."""
    what = "-o page.html --n 40 --guidance 1 --seed 5 --data digits.npy --data-labels labels.npy --json"
    document = said(cli("report", DEMO, *what.split(), cwd=folder))
    return (folder / "page.html").read_text(), document


def test_the_page_loads_nothing_and_is_well_formed(report: Made) -> None:
    text, _ = report
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "form"), tag
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?://|@import|url\(", text)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert len(text) < 400_000


def test_the_pictures_are_the_flows_samples_none_left_out(report: Made) -> None:
    pictures = Page(report[0]).pictures()
    drawn = np.asarray(Flow.open(DEMO).sample(40, labels=np.arange(40) % 10, guidance=Guidance(1.0), seed=5))
    zoom = 6  # 48 pixels
    for label in range(10):
        strip = pictures[f"4 samples, class {label}"]
        for k, image in enumerate(to_uint8(drawn[label::10])):
            left = k * (8 + 1) * zoom
            shown = strip[::zoom, left : left + 8 * zoom : zoom]
            assert largest(shown[..., 0], image[0]) <= 1
            assert (shown[..., 3] == 255).all()
    stages = [f"samples: {name}" for name in ("noise", "block 3", "block 2", "block 1", "block 0", "denoised")]
    assert [name for name in pictures if name.startswith("samples:")] == stages
    assert all(pictures[name].shape[:2] == (48, (SHOWN * 9 - 1) * zoom) for name in stages)


def test_the_numbers_are_the_flows_and_the_page_says_how_to_make_it_again(report: Made, folder: Path) -> None:
    text, said = report
    words, flow = Page(text).text, Flow.open(DEMO)
    raw = flow.sample(40, labels=np.arange(40) % 10, guidance=Guidance(1.0), seed=5, denoise=False, certify=True)
    certificate = report_of(raw).certificate
    assert certificate is not None
    data = flow.dequantise(np.load(folder / "digits.npy"), 5)
    expected = {
        "samples": flow.bits_per_dim(raw, np.arange(40) % 10).mean(),
        "data": flow.bits_per_dim(data, np.load(folder / "labels.npy")).mean(),
    }
    assert said["mean_bits_per_dim"] == pytest.approx(expected, abs=1e-3)
    assert said["certificate"] == pytest.approx(float(certificate.max()), rel=0.5)
    for value in expected.values():
        assert f"{value:.3f}" in words
    assert flow.bundle.hash in words
    assert "tarflow report" in words
    assert "--n 40 --guidance 1 --seed 5 --data digits.npy --data-labels labels.npy" in words
    for word in ("onnxruntime", "exported with torch", "15 passes", "denoising", "cosine", "Round trip"):
        assert word in words


def test_latents_of_noise_lie_on_the_diagonal_and_of_something_else_do_not() -> None:
    values = normal(0, range(50), (100,)).astype(np.float64).ravel()

    def distances(svg: str) -> NDArray[np.float64]:
        points = np.array(re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg), float)
        side = [float(x) for x in re.findall(r"[\d.]+", re.findall(r'class="rule" d="([^"]+)"', svg)[0])]
        start, stop = side[:2], side[2:]
        line = start[1] + (points[:, 0] - start[0]) / (stop[0] - start[0]) * (stop[1] - start[1])
        return np.abs(points[:, 1] - line) / abs(stop[1] - start[1])

    assert np.median(distances(plots.quantiles({"z": values}, "q"))) < 0.005
    assert np.median(distances(plots.quantiles({"z": 1.5 * values}, "q"))) > 0.02


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-1e-9, 1e9], [3.0, 3.0000001], list(range(1000))])
def test_any_numbers_make_a_plot_with_marks_inside(values: list[float]) -> None:
    for decades in (False, True):
        svg = plots.histogram({"a <b>": np.array(values)}, "x & y", "t", decades)
        page = Page(svg)
        marks = [float(a["x"]) for t, a in page.tags if t == "text" and a.get("class") == "below"]
        assert "nan" not in svg
        assert all(48 - 1e-6 <= x <= 548 + 1e-6 for x in marks)
        assert 1 <= len(marks) <= 14


def test_a_model_without_noise_to_remove_drawn_without_labels_has_a_page_too() -> None:
    opened = Flow.open(DEMO)
    manifest = replace(opened.bundle.manifest, config=replace(opened.config, noise_std=None), parity={})
    flow = Flow(replace(opened.bundle, manifest=manifest), opened.backend)
    found = examine(flow, Request(6).resolved(flow.config))
    text = render(found, Making("tarflow report", "2020-01-01", {"tarflow": "0"}))
    names = list(Page(text).pictures())
    assert "6 samples, no label" in names
    assert names[-3] == "samples: block 0", "the last of the stages: nothing is denoised"
    assert "was not verified" in text


def test_samples_that_are_not_finite_are_named(cli: Cli, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = cli("report", DEMO, "-o", page, "--n", 40, "--guidance", 22, "--json")
    assert done.returncode == 1, done.stderr
    broken = json.loads(done.stdout)["nonfinite"]
    assert 0 < len(broken) < 40
    assert f"Samples {broken[0]}" in Page(page.read_text()).text


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ("--guidance 1e6", 1, "none of 160 samples is finite"),
        ("--data nothing", 2, "no images at 'nothing'"),
        ("--n 1", 2, "--n is 1"),
        ("--labels 12", 2, "label 12 is out of range"),
        ("--labels -2", 2, "label -2 is out of range"),
        ("-o no/where.html", 2, "does not exist"),
    ],
)
def test_a_failure_leaves_the_old_page(args: str, code: int, message: str, tarflow: Cli, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    refused(tarflow("report", DEMO, *args.split()), code, message)
    assert (tmp_path / "report.html").read_text() == "old"


def test_colours_are_kept_and_what_is_no_number_is_black() -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32)
    images[1, :, 5] = np.nan
    (shown,) = Page(f"<div>{plots.picture(images, 'two')}</div>").pictures().values()
    assert shown.shape == (64, 129, 4)
    np.testing.assert_array_equal(shown[:, :64, :3], to_uint8(images[0]).transpose(1, 2, 0))
    assert not shown[5, 65:, :3].any()
    assert not shown[:, 64].any(), "nothing between them, on any background"
