"""Samples remember how they were drawn, and what is made of them has what is its own of that, or nothing."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tarflow import Flow
from tarflow.runtime.errors import InputError
from tarflow.runtime.samples import CertifiedSamples, Samples

ROWS: list[Any] = [
    slice(2, 5), slice(None, None, -1), slice(1, None, 3), slice(0, 0), [4, 0, 4], np.array([5, 1]), Ellipsis, (),
    np.array([True, False] * 3), (slice(1, 3), Ellipsis), (slice(1, 3), slice(None), slice(None)),
    (Ellipsis, slice(None)),
]  # fmt: skip
NO_ROWS: list[Any] = [
    0, (0, Ellipsis), (slice(None), 0), (Ellipsis, slice(0, 4)), (slice(None), slice(None), slice(None, None, -1)),
    None, ([0, 1], [0, 0]), [[0, 1], [2, 3]], (slice(None), None), (Ellipsis, 0), np.ones((6, 1, 8, 8), bool), True,
]  # fmt: skip


@pytest.fixture(scope="module")
def drawn(flow: Flow) -> CertifiedSamples:
    return flow.sample(6, labels=np.arange(6), guidance=20.0, seed=4, first_sample=10, certify=True)


@pytest.mark.parametrize("key", ROWS, ids=str)
def test_rows_have_the_report_of_these_rows(drawn: CertifiedSamples, key: Any) -> None:
    part, rows = drawn[key], np.arange(6)[key[0] if isinstance(key, tuple) and key else key]
    assert isinstance(part, CertifiedSamples)
    assert np.array_equal(part, np.asarray(drawn)[key], equal_nan=True)
    assert list(part.report.samples) == (rows + 10).tolist()
    assert np.array_equal(part.certificate, drawn.certificate[rows], equal_nan=True)
    assert np.array_equal(part.log_prob, drawn.log_prob[rows], equal_nan=True)
    assert set(part.report.nonfinite) == set(drawn.report.nonfinite) & set(part.report.samples)
    assert part.report.seed == 4
    consecutive = len(rows) > 0 and rows.tolist() == list(range(rows[0], rows[0] + len(rows)))
    assert part.report.first_sample == (10 + rows[0] if consecutive else None)


def test_rows_of_rows_are_followed(drawn: CertifiedSamples) -> None:
    part = drawn[[5, 3, 1]][1:]
    assert list(part.report.samples) == [13, 11]
    assert np.array_equal(part.log_prob, drawn.log_prob[[3, 1]], equal_nan=True)


def test_what_overflowed_and_was_redrawn_stays_with_its_rows(flow: Flow) -> None:
    wild = flow.sample(24, labels=np.arange(24) % 10, guidance=40.0, denoise=False, redraw_nonfinite=True)
    redrawn = wild.report.redrawn
    assert redrawn, "guidance of 40 must overflow somewhere, or this test shows nothing"
    first = redrawn[0]
    assert wild[first : first + 1].report.redrawn == (first,)
    assert wild[[row for row in range(24) if row not in redrawn]].report.redrawn == ()
    assert type(wild) is Samples
    assert wild.certificate is None


@pytest.mark.parametrize("key", NO_ROWS, ids=str)
def test_what_is_no_rows_of_images_has_no_report(drawn: CertifiedSamples, key: Any) -> None:
    part = drawn[key]
    assert getattr(part, "report", None) is None
    assert np.array_equal(part, np.asarray(drawn)[key], equal_nan=True)


def test_what_is_computed_of_samples_has_no_report(drawn: CertifiedSamples) -> None:
    with np.errstate(all="ignore"):
        made = [
            drawn * 2,
            drawn + drawn,
            drawn.mean(0),
            drawn.T,
            drawn.reshape(3, 2, 1, 8, 8),
            drawn.astype(np.float64),
        ]
    made += [np.concatenate([drawn, drawn]), drawn.flatten(), np.stack([drawn, drawn]), drawn.take([1, 0], 0)]
    for one in made:
        assert [getattr(one, name, None) for name in ("report", "certificate", "log_prob")] == [None] * 3
        assert not isinstance(one, Samples) or one._repr_html_() is None, "numbers, in a notebook"


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_copies_and_pickles_keep_the_report(drawn: CertifiedSamples, protocol: int) -> None:
    whole, part = drawn, drawn[[3, 1]]
    for one in (whole, part):
        twins = [one.copy(), copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one, protocol))]
        for twin in twins:
            assert type(twin) is CertifiedSamples
            assert np.array_equal(twin, one, equal_nan=True)
            assert not np.shares_memory(twin, one)
            assert list(twin.report.samples) == list(one.report.samples)
            assert np.array_equal(twin.log_prob, one.log_prob, equal_nan=True)


def test_they_are_saved_as_a_picture_that_says_what_it_is(drawn: CertifiedSamples, tmp_path: Path) -> None:
    drawn.save(tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert (picture.info["seed"], picture.info["sample_indices"]) == ("4", "10-15")
        assert np.array_equal(np.asarray(picture), np.asarray(drawn.pil()))
    drawn[[3, 1]].save(str(tmp_path / "two.png"))
    with Image.open(tmp_path / "two.png") as picture:
        assert picture.info["sample_indices"] == "13, 11"
    with pytest.raises(InputError, match=r"grid\.gif"):
        drawn.save(tmp_path / "grid.gif")
    for no_images in (drawn[0], drawn[0:0]):
        with pytest.raises(InputError, match="`images` is an array of shape"):
            no_images.save(tmp_path / "none.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "two.png"]


def test_a_notebook_shows_the_picture_and_a_line(drawn: CertifiedSamples) -> None:
    png, html = drawn._repr_png_(), drawn._repr_html_()
    assert png is not None
    assert html is not None
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.size == drawn.pil().size
    for words in (
        '<img src="data:image/png;base64,',
        "6 samples",
        "seed 4",
        "sample_indices 10-15",
        "round-trip error",
    ):
        assert words in html
