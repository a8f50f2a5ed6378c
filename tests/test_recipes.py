"""Recipes that make what is not in the package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tarflow.quality.features import FeatureNetwork, Usage

from .conftest import python

RECIPE = Path(__file__).parent.parent / "recipes" / "inception.py"


@pytest.fixture(scope="module")
def inception() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inception", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def saved(module: ModuleType, path: Path, classes: int) -> dict[str, Any]:
    """Random weights, as the file of one or the other has them."""
    torch.manual_seed(0)
    state: dict[str, Any] = module.Inception(32, fid=classes == 1008).state_dict()
    state |= {"fc.weight": torch.zeros(classes, 2048), "fc.bias": torch.zeros(classes)}
    torch.save(state, path)
    return state


def test_random_weights_of_fid_become_a_network_that_evaluate_takes(inception: ModuleType, tmp_path: Path) -> None:
    saved(inception, tmp_path / "w.pth", 1008)
    done = python(RECIPE, "--weights", tmp_path / "w.pth", "--size", 32, "-o", tmp_path / "i.onnx")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["weights"], told["distances"]) == ("fid", "those of papers")
    assert told["onnx_against_torch"] < 1e-5
    images = np.random.default_rng(1).integers(0, 256, (3, 3, 32, 32), np.uint8)
    found = FeatureNetwork.open(tmp_path / "i.onnx", Usage(feature_range="0,255"))(images)
    with torch.no_grad():
        expected = inception.load(tmp_path / "w.pth", 32)(torch.from_numpy(images.astype(np.float32)))
    assert np.abs(found - expected.numpy()).max() < 1e-5 * float(expected.abs().max())


def test_the_file_tells_whose_weights_they_are_and_what_is_none_is_refused(
    inception: ModuleType, tmp_path: Path
) -> None:
    state = saved(inception, tmp_path / "w.pth", 1000) | {"AuxLogits.fc.weight": torch.zeros(1000, 768)}
    torch.save(state, tmp_path / "w.pth")
    assert not inception.load(tmp_path / "w.pth", 32).fid
    del state["Mixed_7c.branch1x1.conv.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(SystemExit, match=r"holds no Inception v3: .*Mixed_7c.branch1x1.conv.weight"):
        inception.load(tmp_path / "w.pth", 32)
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(SystemExit, match="holds no Inception v3: expected its state_dict"):
        inception.load(tmp_path / "w.pth", 32)


def test_pictures_are_resized_as_tensorflow_1_did_or_by_the_middles_of_pixels(inception: ModuleType) -> None:
    x = torch.rand(1, 1, 40, 40)
    across = inception.resizing(40, asymmetric=False)
    bilinear = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    assert (across @ x @ across.T - bilinear).abs().max() < 1e-5
    first = inception.resizing(40, asymmetric=True)
    assert first[0].tolist() == [1.0] + [0.0] * 39
    assert first[10].nonzero().flatten().tolist() == [1, 2], "299 / 40 apart: the tenth lies at 1.34"
