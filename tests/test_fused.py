"""Graphs for ONNX Runtime's CUDA provider, in float32 on its CPU kernels: the same steps on the same state."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.weights import random_model
from tarflow.config import Config
from tarflow.export.emulate import widened
from tarflow.export.fused import fits, fuse
from tarflow.export.graphs import Resident
from tarflow.export.trace import place, shape_of
from tarflow.export.weights import rename, write_weights
from tarflow.model import TarFlow
from tarflow.runtime.backend import Branches
from tarflow.runtime.bundle import FUSED, WEIGHTS, Bundle
from tarflow.runtime.errors import BundleError
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.opening import Opening
from tarflow.runtime.ort.backend import OrtBackend
from tarflow.runtime.ports import Sizes, inputs, is_state, outputs, shape
from tarflow.runtime.precision import PRECISIONS

from .conftest import Exported, amend, python
from .cpp_library import BUNDLE, CppError, CppFlow

MODELS = {
    "with classes": Config(8, 3, 2, width=64, blocks=2, layers=2, classes=3, noise_std=0.1),
    "without": Config(8, 1, 2, width=32, blocks=2, layers=1, head_dim=16, noise_std=0.1),
    "volume-preserving": Config(8, 1, 2, width=64, blocks=2, layers=2, classes=2, nvp=False, noise_std=0.1),
}
Feeds = dict[str, NDArray[Any]]
ALONE = Opening("cpu", threads=1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Steps this small are slower on several threads, and far slower on cores that others use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def a_model(name: str) -> TarFlow:
    """Random in every weight: a fresh model's biases are 0, its norms 1."""
    model = random_model(MODELS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def a_start(config: Config, images: int, branches: int) -> Feeds:
    """What a resident step reads at the first position."""
    rng = np.random.default_rng(images)
    read: Feeds = {}
    for port in inputs(shape_of(config), "resident"):
        size = shape(port, Sizes(images, branches))
        read[port.name] = np.zeros(size, np.int64 if port.holds == "index" else np.float32)
        if port.name in ("x", "z"):
            read[port.name] = rng.standard_normal(size).astype(np.float32)
    read["labels"] = rng.integers(0, config.classes + 1, read["labels"].shape)
    read["mix"][:] = 1
    read["inverse_temperature"][:] = 1
    if branches > 1:
        read["mix"][:, 0], read["mix"][:, 1] = 1.5, -np.linspace(0, 1, config.tokens)
        read["inverse_temperature"][1] = 0.7
    return read


def resident_step(graph: nn.Module, read: Feeds) -> Feeds:
    """In PyTorch."""
    tensors = {name: torch.from_numpy(array) for name, array in read.items()}
    cache = [tensors.pop(name) for name in [*tensors] if name.startswith(("key_", "value_"))]
    made: tuple[Tensor, ...] = graph(*tensors.values(), cache)
    return {name: tensor.numpy() for name, tensor in zip(filter(is_state, read), made, strict=True)}


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_every_step_of_a_block_is_the_resident_one(model: str, branches: int, images: int, tmp_path: Path) -> None:
    flow = a_model(model)
    stored = write_weights(flow, PRECISIONS["fp32"], tmp_path / WEIGHTS)
    for k, block in enumerate(flow.blocks):
        resident = Resident(block).eval()
        place(fuse(block, branches), k, stored, rename(resident, k), tmp_path / "fused.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "fused.onnx", quiet())
        expected = a_start(flow.config, images, branches)
        found = {name: array for name, array in expected.items() if name != "offsets"}
        names = [output.name.removesuffix("_next") for output in session.get_outputs()]
        for _ in range(flow.config.tokens - 1):
            expected |= resident_step(resident, expected)
            found |= dict(zip(names, session.run(None, found), strict=True))
        for name in names:
            np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=2e-5, err_msg=f"block {k}, {name}")


def quiet() -> onnxruntime.SessionOptions:
    """Without warnings that a state is copied, where it may be, and on one thread: steps this small need no more."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


@pytest.fixture(scope="module")
def wide(bundle: Exported) -> Iterator[Bundle]:
    """The demo in fp16, its graphs for devices in float32."""
    with widened(Bundle.open(bundle("demo", "fp16"))) as found:
        yield found


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(1.0, annealed=True, attention_temperature=0.7)])
@pytest.mark.parametrize("windows", [[1] * 15, [1, 1, 4, 1, 1, 3, 1, 3], [7, 1, 7]])
def test_steps_of_one_position_and_windows_run_by_turns_on_one_state(
    wide: Bundle, guidance: Guidance, windows: list[int]
) -> None:
    config, labels = wide.manifest.config, np.array([3, -1])
    assert sum(windows) == config.tokens - 1
    flow = Flow(wide, OrtBackend(wide, ALONE, resident=True))
    guess = flow.noise(1, range(2))
    branches = guidance.branches(config.tokens, labels)
    found = []
    for fused in (True, False):
        backend = OrtBackend(wide, ALONE, resident=True, fused=fused)
        decoding: Any = backend.decoding(1, flow.noise(0, range(2)), branches)
        decoding.guess(guess)  # what is behind a window is not known yet
        position = 0
        for window in windows:
            decoding.step(position, window)
            position += window
        found.append(decoding.patches())
        opened = {kind for _, kind in backend.sessions._open}
        assert (FUSED[len(branches.labels)] in opened) == fused
    np.testing.assert_allclose(found[0], found[1], rtol=2e-5, atol=2e-5)


def test_a_step_writes_one_slot_of_the_cache_and_one_patch(wide: Bundle) -> None:
    backend = OrtBackend(wide, ALONE, resident=True, fused=True)
    config = wide.manifest.config
    z = np.random.default_rng(0).standard_normal((3, config.tokens, config.patch_dim)).astype(np.float32)
    decoding: Any = backend.decoding(0, z, Branches.plain(np.array([0, 2, -1]), config.tokens))
    names = [port.name for port in inputs(config, FUSED[1]) if is_state(port.name) and port.name != "position"]
    for position in range(4):
        before = {name: decoding._steps.read(name) for name in names}
        decoding.step(position)
        for name in names:
            changed = np.flatnonzero((decoding._steps.read(name) != before[name]).any((0, 1, 3)))
            assert list(changed) == [position + (name == "x")]
        assert decoding._steps.read("position") == [position + 1]


IN_PLACE = """
import sys, numpy as np, onnxruntime as ort
from tarflow.runtime.ports import is_state, next_name
options = ort.SessionOptions()
options.log_severity_level = 2  # warnings
session = ort.InferenceSession(sys.argv[1], options)
binding, kept = session.io_binding(), []
for port in session.get_inputs():
    size = [1 if isinstance(count, str) else count for count in port.shape]
    array = np.zeros(size, np.int64 if "int64" in port.type else np.float32)
    value = ort.OrtValue.ortvalue_from_numpy(array)
    binding.bind_ortvalue_input(port.name, value)
    if is_state(port.name):
        target = ort.OrtValue.ortvalue_from_numpy(array.copy()) if port.name == "position" else value
        binding.bind_ortvalue_output(next_name(port.name), target)
        kept.append(target)
session.run_with_iobinding(binding)
"""


def test_nothing_is_copied_when_outputs_share_the_inputs_memory(wide: Bundle) -> None:
    done = python("-c", IN_PLACE, wide.path(wide.manifest.blocks[0].graphs[FUSED[1]]), timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_bundle_in_fp16_has_them_and_no_other(bundle: Exported) -> None:
    kinds = set(FUSED.values())
    for case, engine in (("demo", "fp16"), ("cond", "fp32"), ("demo", "int8")):
        blocks = Bundle.open(bundle(case, engine)).manifest.blocks
        assert [kinds & block.graphs.keys() for block in blocks] == [kinds if engine == "fp16" else set()] * len(blocks)


def test_they_have_the_residents_inputs_and_their_weights_in_the_weights_file(bundle: Exported) -> None:
    opened = Bundle.open(bundle("demo", "fp16"))
    config = opened.manifest.config
    for block in opened.manifest.blocks:
        for kind in FUSED.values():
            graph = onnx.load(opened.path(block.graphs[kind]), load_external_data=False).graph
            assert [value.name for value in graph.input] == [port.name for port in inputs(config, kind)]
            assert [value.name for value in graph.output] == [port.name for port in outputs(config, kind)]
            inside = {tensor.name: len(tensor.raw_data) for tensor in graph.initializer if not tensor.external_data}
            assert max(inside.values()) <= max(8 * config.tokens, 4 * config.width), inside


def test_heads_that_attention_has_no_kernels_for_are_left_to_the_resident_graph() -> None:
    for size, expected in ((8, True), (12, False), (64, True), (512, False)):
        assert fits(shape_of(Config(8, 1, 2, width=size, blocks=1, layers=1, head_dim=size))) == expected


def test_the_parity_card_tells_of_them(bundle: Exported) -> None:
    card = Bundle.open(bundle("demo", "fp16")).manifest.parity
    for kind in FUSED.values():
        assert 0 < card[kind]["rms"] < 1e-3
    assert not set(FUSED.values()) & Bundle.open(bundle("cond")).manifest.parity.keys()


def without(folder: Path) -> Path:
    """As it was exported before there were such graphs."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for block in manifest["blocks"]:
        for kind in FUSED.values():
            name = block["graphs"].pop(kind)
            del manifest["files"][name]
            (folder / name).unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_bundle_without_them_draws_the_same_bits_in_both_languages(bundle: Exported, copy: Exported) -> None:
    whole, older = bundle("demo", "fp16"), without(copy("demo", "fp16"))
    how: dict[str, Any] = {"labels": np.arange(3), "seed": 3, "guidance": 1.5}
    found, expected = (CppFlow(folder).sample(3, **how) for folder in (older, whole))
    assert np.array_equal(found, expected)
    how["guidance"] = Guidance(1.5)
    found, expected = (np.asarray(Flow.open(folder).sample(3, **how)) for folder in (older, whole))
    assert np.array_equal(found, expected)


def test_one_that_is_named_is_there_and_holds_what_exports_write(copy: Exported) -> None:
    folder = copy("demo", "fp16")
    path = folder / "block_01.cuda_guided.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.node[0].op_type, model.graph.node[0].domain = "QMoE", "com.microsoft"
    onnx.save(model, path)
    amend(folder, path.name)
    refused_by_both(folder, "computes with 'com.microsoft:QMoE', which no export writes")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][path.name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused_by_both(folder, r"blocks\[1\].graphs.cuda_guided is .*which is not among the files")


@pytest.mark.parametrize("kind", ["step", "resident"])
def test_onnx_runtimes_own_operators_stand_in_no_other_graph(copy: Exported, kind: str) -> None:
    """Their kernels for CPUs trust, in ONNX Runtime 1.25, what a stranger's graph says."""
    folder = copy("demo", "fp16")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["blocks"][2]["graphs"][kind] = manifest["blocks"][2]["graphs"]["cuda"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused_by_both(folder, r"block_02\.cuda\.onnx' .*com\.microsoft.*, which no export writes")


def refused_by_both(folder: Path, why: str) -> None:
    with pytest.raises(BundleError, match=why):
        Flow.open(folder)
    with pytest.raises(CppError, match=why) as refused:
        CppFlow(folder)
    assert refused.value.status == BUNDLE
