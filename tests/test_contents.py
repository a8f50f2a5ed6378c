"""What ``generate`` wrote, in every format, is what ``evaluate --samples`` and others read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tarflow.runtime.errors import CheckFailed
from tarflow.runtime.flow import Flow
from tarflow.runtime.image import to_uint8
from tarflow.shards.contents import is_drawn, read_shards

from .conftest import DEMO, Cli, refused, said

DRAWN = "--n", 80, "--labels", "0-9", "--seed", 4
IMAGE = (1, 8, 8)


@pytest.mark.parametrize("form", ["npy", "safetensors", "png", "tar"])
def test_shards_are_read_back_in_order(form: str, tarflow: Cli, tmp_path: Path, flow: Flow) -> None:
    how = "--shard-size", 32, "--format", form, "--out", "drawn"
    assert tarflow("generate", DEMO, *DRAWN, *how).returncode == 0
    assert is_drawn(tmp_path / "drawn")
    parts = list(read_shards(tmp_path / "drawn", IMAGE))
    assert [len(part) for part in parts] == [32, 32, 16]
    found = np.concatenate(parts)
    expected = flow.sample(80, labels=np.arange(80) % 10, seed=4, reproducible=True)
    assert np.array_equal(found if form in ("png", "tar") else to_uint8(found), to_uint8(expected))


def test_evaluate_takes_what_generate_writes(tarflow: Cli, tmp_path: Path) -> None:
    for place in (["--out", "npy"], ["--out", "tar", "--format", "tar"], ["--reproducible", "--save", "x.npz"]):
        assert tarflow("generate", DEMO, *DRAWN, *place).returncode == 0
    how = "--resamples", 2, "--json"
    first, *others = (said(tarflow("evaluate", DEMO, "--samples", x, *how)) for x in ("npy", "tar", "x.npz"))
    assert first["count"] == 80
    assert [found["distance"] for found in others] == [first["distance"]] * 2
    folder = tmp_path / "npy"
    shard = folder / "shard-000000.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    refused(tarflow("evaluate", DEMO, "--samples", "npy"), 4, "is not the shard that the index names")
    (folder / "index.json").unlink()
    refused(tarflow("evaluate", DEMO, "--samples", "npy"), 2, "is not finished")


def test_samples_that_are_not_finite_are_no_pictures(tarflow: Cli, tmp_path: Path) -> None:
    tarflow("generate", DEMO, "--n", 16, "--out", "drawn", "--format", "png")
    index = json.loads((tmp_path / "drawn" / "index.json").read_text())
    (tmp_path / "drawn" / "index.json").write_text(json.dumps(index | {"nonfinite": [3]}))
    with pytest.raises(CheckFailed, match=r"1 samples in .* are not finite, the first 3"):
        list(read_shards(tmp_path / "drawn", IMAGE))
