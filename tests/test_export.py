"""What an export writes: typed graphs, every weight once, a whole bundle or none."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from tarflow.checkpoint import CheckpointError, load
from tarflow.export import pipeline
from tarflow.export.comparison import Comparison, oracle_pairs, verify_bundle
from tarflow.export.estimate import estimate
from tarflow.export.pipeline import export
from tarflow.quality import parity
from tarflow.runtime.bundle import FUSED, MANIFEST, WEIGHTS, Bundle
from tarflow.runtime.errors import BundleError, CheckFailed, InputError, MachineError
from tarflow.runtime.flow import Flow
from tarflow.runtime.precision import PRECISIONS, Tolerance

from .conftest import DEMO, Exported, Goldens, amend, largest
from .interrupting import interrupted
from .test_files import contents

Spoil = Callable[[str, str, Callable[[torch.Tensor], object]], Path]
WIDE_OPS = {"LayerNormalization", "Softmax", "Gelu", "Exp", "Erf", "ReduceMean", "Sqrt"}


@pytest.fixture
def spoil(golden: Goldens, tmp_path: Path) -> Spoil:
    """spoil("vp", "var", lambda weight: weight.mul_(4)): the case's checkpoint with one weight changed in place."""

    def make(case: str, name: str, change: Callable[[torch.Tensor], object]) -> Path:
        path = golden(case).checkpoint
        state = torch.load(path, weights_only=True)
        change(state[name])
        torch.save(state, tmp_path / path.name)
        return tmp_path / path.name

    return make


def typed_nodes(path: Path) -> list[tuple[onnx.NodeProto, int]]:
    """Every node with the type of its first float input."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=False)
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    types |= {t.name: t.data_type for t in graph.initializer}
    return [(node, types.get(node.input[0], 0)) for node in graph.node if node.input]


@pytest.mark.parametrize(("case", "engine"), [("cond", "fp32"), ("demo", "fp16"), ("uncond", "bf16")])
def test_precision_is_typed_into_the_graphs(bundle: Exported, case: str, engine: str) -> None:
    opened = Bundle.open(bundle(case, engine))
    for block in opened.manifest.blocks:
        for kind, name in block.graphs.items():
            if kind in FUSED.values():  # ONNX knows no types behind operators of ONNX Runtime's own: test_fused.py
                continue
            products = 0
            for node, kind_of_input in typed_nodes(opened.path(name)):
                if node.op_type in ("MatMul", "Gemm"):
                    products += 1
                    assert kind_of_input == PRECISIONS[engine].onnx, f"{name}: {node.name} is not {engine}"
                if node.op_type in WIDE_OPS:
                    assert kind_of_input == onnx.TensorProto.FLOAT, f"{name}: {node.name} is not float32"
            assert products > 4, f"{name} has {products} matrix products: {kind} lost its network"


def test_every_weight_lies_once_in_the_weights_file_under_its_reference_name(golden: Goldens, bundle: Exported) -> None:
    opened = Bundle.open(bundle("cond"))
    stored = load_file(opened.path(WEIGHTS))
    theirs = torch.load(golden("cond").checkpoint, weights_only=True)
    theirs = {name: tensor.numpy() for name, tensor in theirs.items() if not name.endswith("attn_mask")}
    assert theirs.keys() == {name for name in stored if not name.startswith("derived.")}
    assert all(np.array_equal(stored[name], theirs[name]) for name in theirs)
    shared: dict[int, set[str]] = {}
    for k, block in enumerate(opened.manifest.blocks):
        for name in block.graphs.values():
            onnx.checker.check_model(str(opened.path(name)))
            graph = onnx.load(opened.path(name), load_external_data=False).graph
            for tensor in graph.initializer:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    place = {entry.key: entry.value for entry in tensor.external_data}
                    assert place["location"] == WEIGHTS
                    shared.setdefault(int(place["offset"]), set()).add(f"{k}.{tensor.name}")
                else:
                    small = len(tensor.raw_data) <= 4096 or tensor.data_type == onnx.TensorProto.BOOL
                    assert small, f"{name} keeps {tensor.name} of {len(tensor.raw_data)} bytes"
    assert all(len(names) == 1 for names in shared.values()), "one place in the file serves two weights"
    total = sum(entry.size for name, entry in opened.manifest.files.items() if name.endswith(".onnx"))
    assert total < 1 << 20


def test_a_bundle_is_a_checkpoint(golden: Goldens, bundle: Exported) -> None:
    original, again = load(golden("vp").checkpoint), load(bundle("vp"))
    assert again.config == original.config
    torch.testing.assert_close(again.state_dict(), original.state_dict(), rtol=0, atol=0)
    half = load_torch(bundle("demo", "fp16") / WEIGHTS)
    assert half["blocks.0.proj_in.weight"].dtype == torch.float16
    assert half["blocks.0.pos_embed"].dtype == torch.float32


def test_fp16_of_the_demo_is_close_to_fp32(bundle: Exported, demo: Path) -> None:
    single, half = Flow.open(demo), Flow.open(bundle("demo", "fp16"))
    labels = np.arange(64) % 10
    a, b = single.sample(64, labels=labels), half.sample(64, labels=labels)
    assert float(np.sqrt(np.mean((np.asarray(a) - np.asarray(b)) ** 2))) < 2e-3
    assert largest(single.bits_per_dim(a, labels), half.bits_per_dim(a, labels)) < 2e-3


def test_an_export_out_of_tolerance_leaves_no_bundle(
    golden: Goldens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRECISIONS, "fp16", replace(PRECISIONS["fp16"], tolerance=Tolerance(1e-9, 1.0, 1.0)))
    with pytest.raises(CheckFailed, match="rms"):
        export(golden("uncond").checkpoint, tmp_path / "bundle", "fp16")
    assert list(tmp_path.iterdir()) == []


def test_an_estimate_tells_the_files_and_sizes_of_the_export(golden: Goldens, bundle: Exported) -> None:
    guessed, opened = estimate(golden("cond").checkpoint), Bundle.open(bundle("cond"))
    made = {name: entry.size for name, entry in opened.manifest.files.items()}
    made[MANIFEST] = (opened.folder / MANIFEST).stat().st_size
    assert guessed.files.keys() == made.keys()
    for name, size in made.items():
        assert 0.4 < guessed.files[name] / size < 2.5, f"{name}: estimated {guessed.files[name]}, made {size}"


def test_verify_compares_with_the_checkpoint_and_catches_another_and_its_prior(
    bundle: Exported, golden: Goldens, spoil: Spoil
) -> None:
    card = verify_bundle(Comparison(bundle("vp"), golden("vp").checkpoint))
    assert card.failures() == []
    assert card.golden is not None
    assert card.golden.rms < 1e-5
    other = spoil("vp", "blocks.1.proj_out.bias", lambda bias: bias.add_(0.01))
    wrong = verify_bundle(Comparison(bundle("vp"), other)).failures()
    assert any("block 1" in sentence for sentence in wrong)
    assert not any("block 0" in sentence for sentence in wrong)
    prior = spoil("vp", "var", lambda variance: variance.mul_(4))
    assert verify_bundle(Comparison(bundle("vp"), prior)).failures()
    with pytest.raises(InputError, match="classes 5 against 3"):
        verify_bundle(Comparison(bundle("vp"), golden("cond").checkpoint))


def test_verify_catches_a_graph_that_is_wrong_only_when_guided(copy: Exported) -> None:
    folder = copy("cond")
    model = onnx.load(folder / "block_01.step.onnx", load_external_data=False)
    (node,) = [n for n in model.graph.node if n.op_type == "ReduceSum"]  # over the branches
    node.op_type = "ReduceMean"
    onnx.save(model, folder / "block_01.step.onnx")
    amend(folder, "block_01.step.onnx")
    wrong = verify_bundle(Comparison(folder)).failures()
    assert wrong
    assert all("guided" in sentence for sentence in wrong)


def test_a_large_model_is_verified_by_sweeps_that_catch_what_a_decode_would(
    bundle: Exported, golden: Goldens, spoil: Spoil, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "_SERIAL_LIMIT", 0.0)
    monkeypatch.setattr(parity, "_SERIAL_STEPS", 3)
    monkeypatch.setattr(parity, "_SWEEP_WINDOW", 5)
    card = verify_bundle(Comparison(bundle("cond"), golden("cond").checkpoint))
    assert "sweep" in card.method
    assert card.failures() == []
    other = spoil("cond", "blocks.2.attn_blocks.1.mlp.main.2.bias", lambda bias: bias.add_(0.05))
    assert any("block 2" in sentence for sentence in verify_bundle(Comparison(bundle("cond"), other)).failures())


# --- refusals ---------------------------------------------------------------------------------------------------


def begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where an export reads its checkpoint."""
    monkeypatch.setattr(pipeline, "open_checkpoint", lambda *_: pytest.fail("began the export"))


def test_an_unknown_precision_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`engine` is 'fp8'; expected one of fp32, fp16"):
        export("nothing.pth", tmp_path / "bundle", "fp8")


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = json.dumps({"name": "My extension", "manifest_version": 3})  # as every web application has one
    for folder, manifest in (("something", None), ("foreign", extension), ("own", "not even JSON")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "thesis.tex").write_text("mine")
        if manifest is not None:
            (tmp_path / folder / MANIFEST).write_text(manifest)
    (tmp_path / "link").symlink_to(tmp_path / "something")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    begins(monkeypatch)
    for path in tmp_path.iterdir():
        with pytest.raises(InputError, match="`force` does not replace it; choose another name"):
            export("nothing.pth", path, force=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("place", [".", "..", "/"])
def test_a_folder_in_use_is_never_replaced(place: str, force: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    begins(monkeypatch)
    with pytest.raises(InputError, match="folder in use"):
        export("nothing.pth", place, force=force)


@pytest.mark.parametrize("place", ["file/bundle", "file/a/b", "/sys/bundle", "/proc/bundle", "x" * 300])
def test_a_place_that_takes_no_folder_is_refused_before_the_work(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    begins(monkeypatch)
    with pytest.raises(MachineError, match="cannot be written"):
        export("nothing.pth", tmp_path / place)
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_disk_without_room_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "weights_size", lambda *_: 1 << 60)
    monkeypatch.setattr(pipeline, "oracle_pairs", lambda *_: pytest.fail("began the export"))
    with pytest.raises(MachineError, match="GiB left: free some"):
        export(DEMO, tmp_path / "a" / "bundle")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("number", "engine", "error", "words"),
    [
        (float("nan"), "fp32", CheckpointError, "qkv.weight is not finite: the checkpoint is broken"),
        (float("inf"), "fp16", CheckpointError, "qkv.weight is not finite: the checkpoint is broken"),
        (1e6, "fp16", InputError, r"qkv.weight reaches 1e\+06, .* can hold; use `engine` bf16 or fp32"),
    ],
)
def test_a_weight_that_cannot_be_stored_is_named(
    number: float, engine: str, error: type[Exception], words: str, spoil: Spoil, tmp_path: Path
) -> None:
    checkpoint = spoil("vp", "blocks.1.attn_blocks.0.attention.qkv.weight", lambda weight: weight[0, 0].fill_(number))
    with pytest.raises(error, match=words):
        export(checkpoint, tmp_path / "a" / "b" / "bundle", engine)
    assert list(tmp_path.iterdir()) == [checkpoint], "new folders were left"


def test_a_damaged_bundle_is_not_exported_again(copy: Exported, tmp_path: Path) -> None:
    folder = copy("uncond")
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(BundleError, match=r"weights\.safetensors' is damaged .* SHA-256"):
        export(folder, tmp_path / "again")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_an_interrupted_export_leaves_the_bundle_that_was_there(
    number: int, code: int, golden: Goldens, copy: Exported, tmp_path: Path
) -> None:
    bundle, checkpoint = copy("uncond"), golden("uncond").checkpoint
    before = contents(tmp_path)
    with pytest.raises(InputError, match="exists"):
        export(checkpoint, bundle)
    args: list[object] = ["export", checkpoint, "-o", bundle, "--force"]
    done = interrupted(args, tmp_path, "trace", number)
    assert (done.returncode, done.stdout) == (code, "")
    assert contents(tmp_path) == before
    assert ("tarflow: interrupted" in done.stderr) == (number == signal.SIGINT)


def test_a_model_whose_samples_are_no_pictures_is_exported_all_the_same(bundle: Exported, spoil: Spoil) -> None:
    """Its golden samples are denoised as they are: a model is not refused for what it draws."""
    wild = load(spoil("cond", "blocks.0.proj_out.weight", lambda weight: weight.mul_(5)))
    pairs = oracle_pairs(wild, Bundle.open(bundle("cond")), lambda stage: None)
    assert np.abs(pairs.images).max() > 8
    assert pairs.denoised is not None
    assert np.isfinite(pairs.denoised).all()
