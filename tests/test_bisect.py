"""Bisect finds what was planted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tarflow.export.bisect import bisect_bundle
from tarflow.export.comparison import Comparison
from tarflow.export.repro import write_repro

from .conftest import Cli, Exported, amend


def plant(folder: Path, name: str, op: str, other: str, which: int) -> str:
    """Turn the ``which``-th node of a kind into another; return its name."""
    model = onnx.load(folder / name, load_external_data=False)
    node = [n for n in model.graph.node if n.op_type == op][which]
    node.op_type = other
    onnx.save(model, folder / name)
    amend(folder, name)
    return str(node.name)


def test_a_sound_bundle_has_nothing_to_find(bundle: Exported) -> None:
    assert bisect_bundle(Comparison(bundle("cond"))) is None
    assert bisect_bundle(Comparison(bundle("uncond", "bf16"))) is None


def test_a_wrong_node_in_a_step_graph_is_named_and_reproduced(copy: Exported, cli: Cli, tmp_path: Path) -> None:
    folder = copy("cond")
    planted = plant(folder, "block_02.step.onnx", "Exp", "Neg", 0)
    done = cli("bisect", folder, "--json", "-o", tmp_path / "repro")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)["found"]
    assert (found["block"], found["graph"], found["step"], found["node"]) == (2, "step", 0, planted)
    assert found["checkpoint_names"] == ["blocks.2.proj_out.weight", "blocks.2.proj_out.bias"]
    session = onnxruntime.InferenceSession(str(tmp_path / "repro" / "node.onnx"))
    inputs = dict(np.load(tmp_path / "repro" / "inputs.npz"))
    (output,) = session.run(None, inputs)
    wrong, right = (next(iter(dict(np.load(tmp_path / "repro" / f"{n}.npz")).values())) for n in ("found", "expected"))
    assert np.allclose(output, wrong)
    assert not np.allclose(output, right, atol=1e-3)
    again = cli("bisect", folder, "-o", tmp_path / "repro")
    assert again.returncode == 2
    assert "--force" in again.stderr


@pytest.mark.parametrize(("kind", "op", "other"), [("forward", "Exp", "Neg"), ("gradient", "Neg", "Exp")])
def test_a_wrong_node_in_the_parallel_graphs_is_named(copy: Exported, kind: str, op: str, other: str) -> None:
    folder = copy("cond")
    planted = plant(folder, f"block_01.{kind}.onnx", op, other, 0)
    found = bisect_bundle(Comparison(folder))
    assert found is not None
    assert (found.suspect.block, found.suspect.kind, found.to_json()["node"]) == (1, kind, planted)


def test_a_wrong_node_is_named_in_emulated_bfloat16_too(copy: Exported, tmp_path: Path) -> None:
    folder = copy("uncond", "bf16")
    planted = plant(folder, "block_01.step.onnx", "Add", "Sub", 2)  # past and own values mixed: in bfloat16
    found = bisect_bundle(Comparison(folder), tolerance=0.02)
    assert found is not None
    assert (found.suspect.block, found.suspect.kind, found.to_json()["node"]) == (1, "step", planted)
    write_repro(tmp_path / "repro", found, force=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "repro" / "node.onnx"))
    (output,) = session.run(None, dict(np.load(tmp_path / "repro" / "inputs.npz")))
    (wrong,) = dict(np.load(tmp_path / "repro" / "found.npz")).values()
    assert np.abs(output - wrong).max() < 0.02  # the graph rounds it to bfloat16


def test_a_wrong_weight_is_named(copy: Exported, tmp_path: Path, bundle: Exported) -> None:
    folder = copy("cond")
    content = bytearray((folder / "weights.safetensors").read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    start, end = json.loads(content[8:begin])["blocks.1.attn_blocks.1.mlp.main.0.bias"]["data_offsets"]
    np.frombuffer(memoryview(content)[begin + start : begin + end], np.float32)[:] += 0.5
    (folder / "weights.safetensors").write_bytes(content)
    amend(folder, "weights.safetensors")
    found = bisect_bundle(Comparison(folder, bundle("cond")))
    assert found is not None
    assert found.suspect.block == 1
    assert "layers.1.up.bias is not the checkpoint's" in found.reason
    assert found.checkpoint_names == ("blocks.1.attn_blocks.1.mlp.main.0.bias",)
    write_repro(tmp_path / "repro", found, force=False)
    assert json.loads((tmp_path / "repro" / "finding.json").read_text())["block"] == 1
