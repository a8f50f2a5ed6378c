"""A little of what ``make torture`` does at length: what holds for hours there holds here for some of it."""

from __future__ import annotations

import functools
import shutil
import time
from pathlib import Path

import pytest

from bench.torture import children, clients, damage, kills
from bench.torture.children import Case
from bench.torture.mutations import absurd_json, cut, flipped
from bench.torture.scenes import SCENES
from bench.torture.targets import TARGETS


@pytest.mark.skipif(shutil.which("strace") is None, reason="kills need strace")
def test_a_job_that_is_killed_stands_and_is_continued() -> None:
    (scene,) = (scene for scene in SCENES if scene.name == "generate --out")
    tally = kills.play(scene, most=5)
    assert (tally.faults, tally.missed, tally.stood["neither"]) == ([], 0, 0)
    assert tally.kills == 5
    assert tally.stood["old"] > 0, "it was killed after its work alone"


def test_damaged_files_are_refused_in_a_sentence_or_read_right() -> None:
    section = damage.torture(count=20)
    assert not section.faults
    assert [row[:2] for row in section.rows] == [(target.name, 20) for target in TARGETS]
    assert sum(int(str(row[2])) for row in section.rows) > 60, "damage that nobody notices proves nothing"


def test_who_is_honest_is_served_beside_who_is_not() -> None:
    seen = clients.beset(seconds=12)
    assert not list(seen.wrong())
    assert len(seen.beset.seconds) > 4
    assert all(seen.troubles.values()), seen.troubles


def test_a_case_is_made_again_by_its_number() -> None:
    target = TARGETS[0]
    content = b'{"a": [1, {"b": 2}], "c": "text"}'
    for change in (flipped, cut, absurd_json):
        assert change(content, damage.dice_of(target, 7)) == change(content, damage.dice_of(target, 7))
        assert len({change(content, damage.dice_of(target, number)) for number in range(20)}) > 5


def waiting(folder: Path) -> Case:
    """Case 1 waits for ever, the first time; case 2 always."""

    def case(number: int) -> str:
        if number == 2 or (number == 1 and not (folder / "once").exists()):
            (folder / "once").touch()
            time.sleep(3600)
        return "right"

    return case


def test_what_waits_for_ever_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_WAITING", 2.0)
    found = list(children.play(functools.partial(waiting, tmp_path), count=3, children=1))
    assert [(outcome.number, outcome.verdict) for outcome in found] == [(0, "right"), (1, "right"), (2, children.STILL)]
