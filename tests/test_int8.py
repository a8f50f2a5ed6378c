"""Weight-only int8: standard Q/DQ graphs that ONNX Runtime fuses and TensorRT takes, within their gate."""

from __future__ import annotations

import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from tarflow import checkpoint
from tarflow.export.engines.blueprint import Blueprint
from tarflow.export.engines.build import build
from tarflow.export.engines.check import verdict
from tarflow.export.engines.options import Options
from tarflow.export.engines.progress import apart
from tarflow.export.quantise import Sensitivity, candidates, chosen, quantise, rounded
from tarflow.export.weights import int8_names
from tarflow.quality.card import Card
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.errors import InputError
from tarflow.runtime.flow import Flow, Guidance

from .conftest import DEMO, Exported, report_of


@pytest.fixture(scope="module")
def int8(bundle: Exported) -> Path:
    return bundle("demo", "int8")


def test_rounding_is_symmetric_and_per_output() -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 40) * torch.logspace(-6, 6, 48).unsqueeze(1)
    weight[7] = 0
    levels, scale = quantise(weight)
    assert (levels.shape, levels.dtype, scale.shape) == ((40, 48), torch.int8, (48,))
    assert levels.abs().max() == 127
    assert ((rounded(weight) - weight).abs() <= 0.5001 * scale.unsqueeze(1)).all()
    assert torch.equal(rounded(-weight), -rounded(weight))
    assert torch.equal(rounded(weight)[7], torch.zeros(40))


def test_what_carries_the_error_stays_float32() -> None:
    small, large, harmless = Sensitivity("small", 1.0, 10), Sensitivity("large", 1.0, 10_000), Sensitivity("x", 0, 10)
    assert chosen([small, large, harmless]) == {"large", "x"}


def test_the_card_is_within_the_gate(int8: Path) -> None:
    manifest = Bundle.open(int8).manifest
    assert manifest.precision == "int8"
    card = Card.from_json(manifest.parity, str(int8))
    assert card.bits_per_dim_shift is not None
    assert card.bits_per_dim_shift < 5e-3
    rows = dict(card.rows())
    assert rows["sample"].rms < 2e-2
    assert rows["denoised"].rms < 1e-2


def test_the_weights_are_a_quarter_and_a_checkpoint(int8: Path, tmp_path: Path) -> None:
    names = int8_names(int8 / "weights.safetensors")
    original, stored = checkpoint.load(DEMO), checkpoint.load(int8)
    exact, found = checkpoint.reference_state(original), checkpoint.reference_state(stored)
    assert 0.9 * len(candidates(original)) <= len(names) <= len(candidates(original)) == 4 * 3 * 4
    for name, tensor in exact.items():
        assert torch.equal(found[name], rounded(tensor) if name in names else tensor), name
    assert (int8 / "weights.safetensors").stat().st_size < 0.3 * (DEMO / "weights.safetensors").stat().st_size
    damaged = load_file(int8 / "weights.safetensors")
    del damaged[f"derived.{min(names)}_scale"]
    save_file(damaged, tmp_path / "x.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match="int8 without scales"):
        checkpoint.load(tmp_path / "x.safetensors")


def test_every_int8_product_of_a_step_is_fused(int8: Path, tmp_path: Path) -> None:
    flow, optimised = Flow.open(int8, "cpu"), tmp_path / "optimised.onnx"
    sessions = flow.backend.sessions  # type: ignore[attr-defined]
    usual = sessions._options

    def keep(kind: str) -> object:
        options = usual(kind)
        if kind == "step":
            options.optimized_model_filepath = str(optimised)
        return options

    sessions._options = keep
    flow.sample(1)
    operators = Counter(node.op_type for node in onnx.load(optimised, load_external_data=False).graph.node)
    first = [name for name in int8_names(int8 / "weights.safetensors") if name.startswith("blocks.0.")]
    assert operators["MatMulNBits"] == len(first)  # block 0's session is opened last
    assert operators["DequantizeLinear"] == 0


def test_classes_are_recognised_as_with_float32(int8: Path) -> None:
    digits = load_digits()
    judge = SVC(gamma=0.001, C=10).fit(digits.data, digits.target)
    labels = np.arange(600) % 10

    def recognised(folder: Path) -> float:
        images = Flow.open(folder).sample(600, labels=labels, guidance=Guidance(1.0))
        sixteenths = np.round((images.clip(-1, 1) + 1) * 127.5).reshape(600, 64) * 16 / 255
        return float((judge.predict(sixteenths) == labels).mean())

    assert abs(recognised(int8) - recognised(DEMO)) <= 0.01


def test_the_certificate_sees_what_int8_steps_do(int8: Path) -> None:
    samples = Flow.open(int8).sample(8, labels=np.arange(8), certify=True)
    certificate = report_of(samples).certificate
    assert certificate is not None
    assert 1e-3 < certificate.max() < 1.0  # the judge's products are float32


def test_parallel_decoding_does_not_settle_on_onnx_runtime_and_is_serial_there(int8: Path) -> None:
    flow = Flow.open(int8, "cpu")
    serial = flow.sample(1, labels=3, denoise=False, decode="serial")
    for how in ({"decode": "fast"}, {"decode": "exact"}, {"tolerance": 1e-4}):
        drawn = flow.sample(1, labels=3, denoise=False, **how)
        assert "in int8 on ONNX Runtime, parallel decoding does not settle" in report_of(drawn).decoding
        assert report_of(drawn).passes == report_of(serial).passes
        assert np.array_equal(drawn, serial)


def test_on_the_native_engine_it_settles(int8: Path) -> None:
    flow = Flow.open(int8, provider="native")
    report = report_of(flow.sample(1, labels=3, decode="fast"))
    assert report.decoding == "parallel to 0.001"
    assert min(report.passes) < flow.config.tokens - 1


def test_tensorrt_takes_the_graphs_but_no_engine_is_kept(int8: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(int8, tmp_path / "bundle"))
    blueprint = Blueprint.of(bundle, Options(batch=(1, 2, 4)))
    graph = bundle.manifest.blocks[1].graphs["resident"]
    found = apart(partial(verdict, blueprint, "resident", graph))
    assert (found.built, found.reason, found.refused) == (True, "", [])
    with pytest.raises(InputError, match="cannot be attested yet"):
        build(bundle)
    assert not (bundle.folder / "engines").exists()
