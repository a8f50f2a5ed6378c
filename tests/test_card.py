"""The parity card: read as it was written, told the same everywhere, and refused if it is another version's."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tarflow.export.card import markdown
from tarflow.quality.card import Card, Difference
from tarflow.runtime.bundle import MANIFEST, Bundle
from tarflow.runtime.errors import BundleError
from tarflow.runtime.precision import PRECISIONS

from .conftest import DEMO, Cli, Exported


@pytest.fixture
def document() -> dict[str, Any]:
    """The demo's card, as an earlier version wrote it."""
    return dict(Bundle.open(DEMO).manifest.parity)


def test_a_card_is_read_as_it_was_written(document: dict[str, Any]) -> None:
    card = Card.from_json(document, "here")
    assert json.dumps(card.to_json()) == json.dumps(document)  # in the same order too
    assert card.tolerance == PRECISIONS["fp32"].tolerance
    assert [name for name, _ in card.rows()] == [
        *(f"block {block}" for block in (3, 2, 1, 0)),
        *("guided", "resident", "sample", "denoised"),
    ]
    assert card.failures() == []
    few = {key: document[key] for key in ("oracle", "backend", "method", "samples", "tolerance", "certificate")}
    assert Card.from_json(few | {"a later key": 1}, "here").to_json() == few


def test_what_is_out_of_tolerance_is_said(document: dict[str, Any]) -> None:
    card = Card.from_json(document, "here")
    off = Difference.between(np.full(3, 0.5), np.zeros(3))
    wrong = replace(card, blocks={**card.blocks, 1: off}, golden=off, certificate=float("nan"), bits_per_dim_shift=1.0)
    assert wrong.failures() == [
        "block 1 rms error 0.5 is above 0.0001",
        "golden rms error 0.5 is above 0.0001",
        "round-trip error nan is above 0.01",
        "shift of bits/dim 1 is above 0.0001",
    ]
    overflow = Difference.between(np.array([1.0, np.inf]), np.ones(2))
    assert replace(card, sample=overflow).failures() == ["sample rms error inf is above 0.0001"]


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"blocks": [1]}, "a block is int; expected dict"),
    ({"blocks": [{"block": 0}]}, "'cosine' is None; expected a number"),
    ({"blocks": None}, "'blocks' is NoneType; expected list"),
    ({"sample": "good"}, "'sample' is str; expected dict"),
    ({"certificate": "small"}, "'certificate' is 'small'; expected a number"),
    ({"tolerance": {"rms": 1}}, "'bits_per_dim' is None; expected a number"),
    ({"samples": 0}, "'samples' is 0; expected an integer of 1 or more"),
    ({"method": 3}, "'method' is int; expected str"),
]


@pytest.mark.parametrize(("changes", "words"), OTHERS, ids=[words for _, words in OTHERS])
def test_a_card_of_another_version_is_refused(changes: dict[str, Any], words: str, document: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=re.escape(f"'here': {words}")):
        Card.from_json(document | changes, "here")


def test_a_card_that_is_not_ours_does_not_stop_inspection(copy: Exported, cli: Cli) -> None:
    folder = copy("uncond")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"parity": {"later": 1}}))
    done = cli("inspect", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"parity: '{folder / MANIFEST}': 'tolerance' is missing.")


def test_terminal_and_page_tell_the_same_card(document: dict[str, Any], cli: Cli) -> None:
    shown = cli("inspect", DEMO).stdout
    page = markdown(Bundle.open(DEMO).manifest, Card.from_json(document, "here"))
    assert page == (DEMO / "PARITY.md").read_text()
    for name, row in Card.from_json(document, "here").rows():
        assert re.search(rf"^  {name} +{row.cosine:.9f} +{row.norm_ratio:.7f} +{row.rms:.2g} ", shown, re.M)
        assert f"| {name} | {row.cosine:.9f} | {row.norm_ratio:.7f} | {row.rms:.2g} |" in page
    assert "Not verified" in markdown(Bundle.open(DEMO).manifest, None)
