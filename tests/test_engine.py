"""Building engines with the real TensorRT-RTX, which needs no GPU: what builds, what is kept, what is refused."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import tensorrt_rtx
import torch
from onnx import TensorProto, helper

from tarflow.config import Config
from tarflow.export.emulate import runnable
from tarflow.export.engines import parity
from tarflow.export.engines.blueprint import GRAPHS, Blueprint
from tarflow.export.engines.build import build
from tarflow.export.engines.layers import Attestation, layer_products, read_network
from tarflow.export.engines.network import Parsed, builder_config, keep_timing, polygraphy
from tarflow.export.engines.options import Options
from tarflow.export.engines.parity import engine_parity, keep_parity, verify_engines
from tarflow.export.engines.progress import Headway
from tarflow.export.engines.target import target_of
from tarflow.export.graphs import BlockGraph
from tarflow.export.precision import torch_type, typed
from tarflow.export.trace import place, shape_of, trace
from tarflow.export.weights import rename, write_weights
from tarflow.model import TarFlow
from tarflow.runtime import graph
from tarflow.runtime.bundle import RESIDENT, WEIGHTS, BlockEntry, Bundle, FileEntry, Manifest, ModelShape
from tarflow.runtime.errors import BundleError, CheckFailed, InputError, MachineError
from tarflow.runtime.files import sha256
from tarflow.runtime.opening import Opening
from tarflow.runtime.ort.backend import OrtBackend
from tarflow.runtime.precision import PRECISIONS
from tarflow.runtime.tensorrt import cuda as cuda_module
from tarflow.runtime.tensorrt.backend import open_tensorrt
from tarflow.runtime.tensorrt.cuda import Cuda
from tarflow.runtime.tensorrt.record import Record, Target
from tarflow.runtime.tensorrt.record_reader import read_record

from .backends import double_device
from .conftest import GOLDEN, Cli, Exported, amend, python, refused, said
from .device_double import DoubleCuda, build_double
from .interrupting import interrupted
from .test_old_bundles import without_graphs_for_devices

QUICK = Options(batch=(1, 2, 4), device=("8.9",))


# --- what builds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_graph_of_the_demo_builds_in_every_precision(copy: Exported, precision: str) -> None:
    opened = Bundle.open(copy("demo", precision))
    folder, record = build(opened, precision, replace(QUICK, window=(1, 4, 8)))
    assert len(record.engines) == 3 * len(opened.manifest.blocks)
    guided_and_window = {(p.branches, p.window[2] > 1) for p in record.profiles["step"]}
    assert guided_and_window == {(1, False), (2, False), (1, True), (2, True)}
    for name, engine in record.engines.items():
        assert (engine.asked, engine.built, engine.attested) == (precision, precision, "network")
        assert sha256(folder / name) == engine.sha256
        assert (folder / name).stat().st_size == engine.size
        assert engine.parity is None  # nothing has run
    assert read_record(folder) == record


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("patch", "width"), [(2, 768), (4, 1024)])  # ImageNet64: 1024 patches of 12 numbers, 256 of 48
def test_every_graph_of_a_large_block_builds(tmp_path: Path, patch: int, width: int, name: str) -> None:
    torch.manual_seed(0)
    model = TarFlow(Config(64, 3, patch, width, blocks=1, layers=2, classes=1000, noise_std=0.05))
    precision = PRECISIONS[name]
    block = typed(model.blocks[0], precision)
    shape, options = shape_of(model.config), replace(QUICK, window=(1, 16, 64), batch=(1, 8, 32))
    record = Record("", name, "tensorrt_rtx", tensorrt_rtx.__version__, Target(None, ("8.9",)), options.profiles(shape))
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(config=shape))
    blueprint = Blueprint(bundle, options, tensorrt_rtx, record)
    stored = write_weights(model, precision, tmp_path / "weights.safetensors")
    parameters = sum(p.numel() for p in model.parameters())
    for kind in GRAPHS.values():
        path = tmp_path / f"{kind}.onnx"
        place(trace(kind, block, torch_type(precision)), 0, stored, rename(BlockGraph(block), 0), path)
        parsed = Parsed(tensorrt_rtx, path)
        assert read_network(tensorrt_rtx, parsed.network).mismatch(name) is None
        plan = parsed.built(builder_config(parsed, blueprint, kind))
        assert plan is not None, parsed.log.take()
        assert memoryview(plan).nbytes > 0.9 * parameters * (4 if name == "fp32" else 2)  # weights are in it


# --- what is kept -----------------------------------------------------------------------------------------------


def test_finished_engines_are_kept_and_only_what_changed_is_built(copy: Exported) -> None:
    opened = Bundle.open(copy())
    seen: list[Headway] = []
    folder, first = build(opened, options=QUICK, watch=seen.append)
    built = {headway.name for headway in seen}
    assert len(built) == 12
    assert max(headway.fraction for headway in seen) == 1.0
    assert any(headway.left for headway in seen)

    def built_again(options: Options = QUICK) -> set[str]:
        seen.clear()
        build(opened, options=options, watch=seen.append)
        return {headway.name for headway in seen if not headway.kept}

    assert built_again() == set()
    (folder / "block_01.step.engine").write_bytes(b"damaged")
    (folder / "block_02.forward.engine").unlink()
    assert built_again() == {"block_01.step.engine", "block_02.forward.engine"}
    windows = replace(QUICK, window=(1, 2, 4))
    assert built_again(windows) == {f"block_0{k}.step.engine" for k in range(4)}  # the others' profiles are the same
    for options in (replace(QUICK, level=1), replace(QUICK, batch=(1, 2, 5))):  # another engine, by its key
        wanted = Blueprint.of(opened, options).engines()
        assert all(wanted[name].key != engine.key for name, engine in first.engines.items())
    (folder / "engines.json").write_bytes(b"{")
    assert built_again() == built
    assert {e.key for e in first.engines.values()} == {e.key for e in read_record(folder).engines.values()}
    assert built_again(replace(QUICK, device=("8.6",))) == built
    assert len(list((opened.folder / "engines").iterdir())) == 2  # each target has a folder of its own


def test_the_keys_of_engines_are_what_they_were() -> None:
    """An engine that an earlier version built, from the same files for the same target, is kept."""
    shape = ModelShape(8, 1, 2, 128, blocks=1, layers=3, classes=10, nvp=True, noise_std=0.15, head_dim=64)
    graphs = {kind: f"block_00.{kind}.onnx" for kind in ("step", "forward", "gradient", RESIDENT)}
    names = (*graphs.values(), WEIGHTS)
    files = {name: FileEntry(64 * letter, 1) for name, letter in zip(names, "abcde", strict=True)}
    manifest = Manifest("toy", "fp32", shape, (BlockEntry(False, graphs),), files, opset=20, exporter={})
    options = Options(batch=(1, 8, 32), window=(1, 4, 8), level=3)
    where, sizes = Target("NVIDIA H100", ("9.0",)), options.profiles(shape)
    record = Record("f" * 64, "fp32", "tensorrt", "11.4.0.106", where, sizes, level=3)
    wanted = Blueprint(Bundle(Path(), manifest, record.bundle), options, None, record).engines()
    assert [engine.key[:16] for engine in wanted.values()] == [
        "5a2afc0bf816c173",
        "918251f1584e1498",
        "4ef60e32f69ddc4f",
    ]


def test_ctrl_c_ends_a_build_at_once_with_130_and_it_goes_on_from_whole_engines(copy: Exported, tmp_path: Path) -> None:
    folder = copy("demo")
    done = interrupted(["build", folder, "--device", "8.9"], tmp_path, "engine 2 of 12", signal.SIGINT)
    assert done.returncode == 130
    assert "interrupted; nothing half-written was left" in done.stderr
    (place,) = (folder / "engines").iterdir()
    made = read_record(place).engines
    assert 1 <= len(made) < 12
    left = {path.name for path in place.iterdir()}
    assert left >= {*made, "engines.json"}
    assert all(name.endswith(".engine") for name in left - {"engines.json"})  # the last may not be in the record yet
    assert all(sha256(place / name) == engine.sha256 for name, engine in made.items())
    seen: list[Headway] = []
    _, record = build(Bundle.open(folder), options=Options(device=("8.9",)), watch=seen.append)
    assert {headway.name for headway in seen if headway.kept} == made.keys()
    assert len(record.engines) == 12


def test_a_timing_cache_is_kept_and_is_no_part_of_what_an_engine_is(copy: Exported, tmp_path: Path) -> None:
    opened = Bundle.open(copy("uncond"))
    blueprint = Blueprint.of(opened, replace(QUICK, timing_cache=tmp_path / "timings"))
    for _ in range(2):  # written, then read and written again
        parsed = Parsed(tensorrt_rtx, opened.path("block_00.forward.onnx"))
        config = builder_config(parsed, blueprint, "forward")
        assert parsed.built(config)
        keep_timing(config, tmp_path / "timings")
        assert (tmp_path / "timings").stat().st_size > 0
    assert blueprint.engines() == Blueprint.of(opened, QUICK).engines()


def test_building_needs_neither_pytorch_nor_its_exporter(copy: Exported) -> None:
    code = (
        "import sys\nfor name in ('torch', 'onnx', 'onnxscript', 'onnx_ir', 'sklearn'): sys.modules[name] = None\n"
        "from tarflow.export.engines.build import build\nfrom tarflow.export.engines.options import Options\n"
        "from tarflow.export.engines import parity\nfrom tarflow.runtime.bundle import Bundle\n"
        f"print(len(build(Bundle.open({str(copy('uncond'))!r}), options=Options(device=('8.9',)))[1].engines))"
    )
    done = python("-c", code, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


# --- precision --------------------------------------------------------------------------------------------------


def test_a_graph_that_asks_fp16_and_builds_fp32_is_caught(copy: Exported, tarflow: Cli) -> None:
    folder = copy("cond", "fp32")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"precision": "fp16"}))  # and is typed fp32
    message = refused(tarflow("build", folder, "--engine", "fp16", "--device", "8.9"), 1, "in fp32, a cache in fp32")
    assert re.search(r"block 0's step engine is not what was asked for: asked fp16, built \d+ matrix", message)


def test_a_single_product_in_the_wrong_precision_is_caught(copy: Exported) -> None:
    folder = copy("cond", "fp16")
    path = folder / "block_02.forward.onnx"
    model = onnx.load(path, load_external_data=False)
    at, product = next((i, node) for i, node in enumerate(model.graph.node) if node.op_type == "MatMul")
    wide = [f"{name}.wide" for name in (*product.input, *product.output)]
    casts = [
        helper.make_node("Cast", [name], [f"{name}.wide"], f"Cast_{name}", to=TensorProto.FLOAT)
        for name in product.input
    ]
    model.graph.node.insert(
        at + 1, helper.make_node("Cast", [wide[-1]], list(product.output), "Cast_out", to=TensorProto.FLOAT16)
    )
    product.input[:], product.output[:] = wide[:-1], wide[-1:]
    for node in reversed(casts):
        model.graph.node.insert(at, node)
    onnx.save(model, path)
    amend(folder)
    with pytest.raises(CheckFailed, match=r"block 2's forward engine .* asked fp16, built 1 matrix products in fp32"):
        build(Bundle.open(folder), options=QUICK)
    (place_,) = (folder / "engines").iterdir()
    assert not (place_ / "block_02.forward.engine").exists()
    assert (place_ / "block_01.forward.engine").exists()  # what was right stays


def layer(name: str, *types: str, **more: str) -> dict[str, Any]:
    """A layer as the inspector writes it."""
    tensors = [{"Name": f"t{i}", "Dimensions": [1], "Format/Datatype": text} for i, text in enumerate(types)]
    return {"Name": name, "LayerType": "gemm", "Inputs": tensors[:-1], "Outputs": tensors[-1:], **more}


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ([layer("Gemm_12", "Half", "Half")], {"fp16": 1}),
        ([layer("Gemm_12", "Row major linear FP32", "Row major linear FP32")], {"fp32": 1}),
        ([layer("Gemm_1", "BFloat16", "Float"), layer("MatMul_7", "Float", "Float")], {"bf16": 1, "fp32": 1}),
        ([layer("__myl_Cast", "Float", "Half"), layer("Add_3", "Float", "Float")], {}),
        ([layer("__myl_Fc", "Half", "Half", Metadata="[ONNX Layer: Gemm_4]\u001e[ONNX Layer: Add_5]")], {"fp16": 1}),
        (["Gemm_12"], {}),  # no details: nothing is known, and that is not good enough
    ],
)
def test_the_inspectors_layers_are_read(layers: list[Any], found: dict[str, int]) -> None:
    assert layer_products({"Layers": layers, "I/O Tensors": []}) == found
    attestation = Attestation(found, frozenset(), "engine")
    assert (attestation.mismatch("fp16") is None) == (found == {"fp16": 1})


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--batch 8,4,1", 2, "--batch is 8,4,1; expected 1 <= least <= best <= most, as in 1,8,32"),
        ("--batch 0", 2, "expected 1 <= least <= best <= most"),
        ("--batch many", 2, "--batch 'many' is not understood; expected MIN,OPT,MAX"),
        ("--window 1,x,3", 2, "--window '1,x,3' is not understood"),
        ("--level 9", 2, "--level is 9; expected 0 (fastest build) to 5 (fastest engine)"),
        ("--device H100", 2, "--device 'H100' is not understood; expected compute capabilities, as in 8.6,8.9"),
        ("--device 9.0", 2, "--device is 9.0; expected some of 7.5, 8.0, 8.6"),
        ("--batch 1,2,1000000000000", 2, "where TensorRT counts to 2147483647"),
        ("--batch 1,8,4000000000", 2, "for 4000000000 guided images the cache takes"),
        ("--window 1,8,64", 2, "--window is 1,8,64; expected 15 at most, as in 1,4,15: this model has 16 patches"),
        ("--engine int3", 2, "--engine is 'int3'; expected one of fp32, fp16, bf16"),
        ("--engine fp16", 1, "nothing was built. Export the checkpoint in that precision: tarflow export CHECKPOINT"),
        ("--device 7.5", 4, "does not build with tensorrt_rtx"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_sentence(
    copy: Exported, tarflow: Cli, arguments: str, code: int, message: str
) -> None:
    refused(tarflow("build", copy(), *arguments.split()), code, message)


def test_a_machine_without_a_driver_gets_one_clear_sentence(copy: Exported, cli: Cli) -> None:
    folder = copy("uncond")
    sentence = "no NVIDIA GPU can be used here (cudaErrorInsufficientDriver): engines need one, with its driver"
    done = cli("build", folder, "--device", "8.9")
    assert done.returncode == 0
    assert f"built, not run: {sentence}" in done.stderr
    done = cli("generate", folder, "--provider", "tensorrt", "--n", "1", "-o", folder.parent / "x.png")
    cure = "use --provider cpu, or run on a machine whose nvidia-smi shows a GPU"
    assert refused(done, 3).strip() == f"tarflow: error: {sentence}; {cure}"
    done = cli("generate", folder, "--provider", "auto", "--n", "1", "-o", folder.parent / "x.png")
    assert done.returncode == 0
    assert "CPU; not tensorrt: no NVIDIA GPU; not cuda: no NVIDIA GPU" in done.stdout


def test_doctor_says_why_each_provider_was_not_tried(cli: Cli) -> None:
    tests = said(cli("doctor", "--json"))["self_test"]
    assert set(tests) == {"native", "cpu", "cpu, graphs for devices", "cuda", "tensorrt"}
    assert tests["cpu"]["ok"] is True
    assert tests["tensorrt"] == {
        "ok": None,
        "error": None,
        "message": "no NVIDIA GPU can be used here (cudaErrorInsufficientDriver): engines need one, with its driver",
    }


def test_what_is_not_installed_is_named_with_what_to_install(copy: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    for absent in ("tensorrt", "tensorrt_rtx", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(MachineError, match=r"engines need TensorRT: .*pip install 'tarflow\[tensorrt-rtx\]'"):
        build(Bundle.open(copy("uncond")))
    with pytest.raises(MachineError, match=r"cuda-python is not installed .*pip install 'tarflow\[tensorrt\]'"):
        Cuda()


def test_full_tensorrt_builds_only_for_the_gpu_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of the road that only a GPU machine takes, up to the builder."""
    cuda = DoubleCuda()
    monkeypatch.setattr(cuda_module, "_load", lambda: cuda)
    assert target_of(tensorrt_rtx, "tensorrt", None) == Target("NVIDIA Double", ("9.0",))
    assert target_of(tensorrt_rtx, "tensorrt", ("9.0",)) == Target(None, ("9.0",))
    with pytest.raises(InputError, match=r"`device` is 8\.6; expected 9\.0: .* the GPU at hand, NVIDIA Double"):
        target_of(tensorrt_rtx, "tensorrt", ("8.6",))
    cuda.devices = -1
    with pytest.raises(MachineError, match="no NVIDIA GPU can be used here"):
        target_of(tensorrt_rtx, "tensorrt", None)


def test_a_build_leaves_nothing_behind_in_polygraphy(copy: Exported) -> None:
    """A later build with the other TensorRT, in the same process, must get that one."""
    from polygraphy import config as settings

    configuring: Any = importlib.import_module("polygraphy.backend.trt.config")
    opened = Bundle.open(copy("uncond"))  # first: whatever exports it may load ONNX Runtime, which sets variables
    before = dict(os.environ), settings.USE_TENSORRT_RTX, configuring.trt
    parsed = Parsed(tensorrt_rtx, opened.path("block_00.forward.onnx"))
    builder_config(parsed, Blueprint.of(opened, QUICK), "forward")
    assert (dict(os.environ), settings.USE_TENSORRT_RTX, configuring.trt) == before
    other = SimpleNamespace(__name__="the other TensorRT")
    with polygraphy(other, "tensorrt")[2]():
        assert configuring.trt is other
        assert not settings.USE_TENSORRT_RTX


def test_export_ends_in_engines_and_says_that_they_have_not_run(cli: Cli, tmp_path: Path) -> None:
    checkpoint = next((GOLDEN / "uncond").glob("*.pth"))
    document = said(cli("export", checkpoint, "-o", tmp_path / "b", "--engine", "fp16", "--no-verify", "--json"))
    record = read_record(Path(document["engines"]))
    assert record.complete(len(Bundle.open(tmp_path / "b").manifest.blocks))
    assert {engine.built for engine in record.engines.values()} == {"fp16"}
    assert "no NVIDIA GPU can be used here" in document["engines_unverified"]
    assert document["engines_missing"] is None


def test_what_export_says_is_missing_is_not_cut_at_a_dot(copy: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    from tarflow.cli.export import _engines

    def broken(name: str, package: str | None = None) -> Any:
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr("tarflow.runtime.tensorrt.library.importlib.import_module", broken)
    folder, why, unverified = _engines(Bundle.open(copy("uncond")), quiet=True)
    assert (folder, unverified) == (None, None)
    assert why is not None
    assert "libnvinfer.so.11: cannot open shared object file" in why
    assert "pip install" not in why


def test_a_bundle_from_before_there_were_graphs_for_devices_is_asked_to_be_exported_again(
    copy: Exported, tarflow: Cli
) -> None:
    folder = without_graphs_for_devices(copy("uncond"))
    cure = f"export it again, its weights are a checkpoint: tarflow export {folder} -o BUNDLE --engine fp32"
    refused(tarflow("build", folder), 4, cure)


# --- check-engine -----------------------------------------------------------------------------------------------


def test_check_engine_names_the_node_that_is_refused(
    copy: Exported, cli: Cli, tarflow: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy("uncond")
    document = said(cli("check-engine", folder, "--json"))
    assert document["ok"]
    assert document["tensorrt"] == f"tensorrt_rtx {tensorrt_rtx.__version__}"
    for found in document["graphs"]:
        model = onnx.load(folder / found["graph"], load_external_data=False)
        assert [node["name"] for node in found["nodes"]] == [node.name for node in model.graph.node]
        assert all(node["supported"] for node in found["nodes"])
        assert found["built"]
    kinds = Counter(found["kind"] for found in document["graphs"])
    assert kinds == dict.fromkeys(("step", "resident", "forward", "gradient"), len(Bundle.open(folder).manifest.blocks))

    path = folder / "block_00.forward.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.node.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "p"], "Planted_1"))
    model.graph.node.append(helper.make_node("Cast", ["q"], ["extra"], "Planted_2", to=TensorProto.FLOAT))
    model.graph.output.append(helper.make_tensor_value_info("extra", TensorProto.FLOAT, None))
    onnx.save(model, path)
    amend(folder)
    known = graph.operators() | {"ai.onnx:DynamicQuantizeLinear"}  # as if exports wrote it: TensorRT does not know it
    monkeypatch.setattr(graph, "operators", lambda: known)
    bad = tarflow("check-engine", folder)
    assert bad.returncode == 1
    assert "Planted_1 (DynamicQuantizeLinear): REFUSED" in bad.stdout
    assert "1 of" in bad.stderr
    assert "DynamicQuantizeLinear (1)" in bad.stderr


# --- parity of engine files -------------------------------------------------------------------------------------


@pytest.fixture
def double(copy: Exported) -> Iterator[tuple[Path, Path, Record]]:
    """A bundle, and its engines on a double of the device."""
    folder = copy()
    with double_device():
        yield folder, *build_double(folder)


def test_bf16_engines_get_a_parity_too_by_emulation(copy: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy("demo", "bf16")
    place, record = build_double(folder)
    opened = Bundle.open(folder)
    with runnable(opened) as here:  # what engines should compute; the device's double knows no bfloat16
        backend = OrtBackend(here, Opening("cpu", memory="least"))
        monkeypatch.setattr(parity, "open_tensorrt", lambda bundle, folder: backend)
        record, unverified = verify_engines(opened, place, record)
        assert unverified is None
        for engine in record.engines.values():
            assert engine.parity is not None
            assert engine.parity["against"] == "ONNX Runtime CPU, bfloat16 emulated"
            assert engine.parity["rms"] < (2e-2 if engine.kind == "step" else 1e-6)  # a step is judged by its inverse
        right = backend.forward
        monkeypatch.setattr(backend, "forward", lambda block, x, branches: right(0, x, branches))
        with pytest.raises(CheckFailed, match=r"block_01\.forward\.engine: rms error"):
            verify_engines(opened, place, record)


def test_engines_of_a_kind_of_graph_that_is_no_more_are_refused(double: tuple[Path, Path, Record]) -> None:
    """As those that were built for TensorRT before 10.15, in a bundle that still holds their graphs."""
    folder, place, record = double
    gone = "block_00.pingpong.onnx"
    (folder / gone).write_bytes(b"any")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["blocks"][0]["graphs"]["pingpong"] = gone
    (folder / "manifest.json").write_text(json.dumps(manifest))
    amend(folder, gone)
    opened, engines = Bundle.open(folder), dict(record.engines)
    engines["block_00.step.engine"] = replace(engines["block_00.step.engine"], graph=gone)
    replace(record, bundle=opened.hash, engines=engines).write(place)
    with pytest.raises(BundleError, match=f"they were built from '{gone}', a kind of graph that is no more") as refused:
        open_tensorrt(opened)
    assert refused.value.remedy is not None
    assert (refused.value.remedy.operation, refused.value.remedy.arguments["bundle"]) == ("build", folder)


def test_the_parity_of_every_engine_is_recorded_and_one_that_computes_something_else_is_not_kept(
    double: tuple[Path, Path, Record],
) -> None:
    folder, place, record = double
    swapped = place / "block_02.step.engine"
    swapped.write_bytes((place / "block_00.step.engine").read_bytes())  # another block's weights
    engines = {**record.engines, swapped.name: replace(record.engines[swapped.name], sha256=sha256(swapped))}
    record = replace(record, engines=engines)
    record.write(place)
    opened = Bundle.open(folder)
    found = engine_parity(opened, open_tensorrt(opened), OrtBackend(opened))
    with pytest.raises(CheckFailed, match=r"not kept:\n  block_02\.step\.engine: rms error .* is above 0\.0001"):
        keep_parity(place, record, found)
    assert not swapped.exists()
    kept = read_record(place).engines
    assert kept.keys() == engines.keys() - {swapped.name}
    for engine in kept.values():
        assert engine.parity is not None
        assert (engine.parity["against"], engine.parity["rms"] < 1e-5) == ("ONNX Runtime CPU", True)
    with pytest.raises(BundleError, match="the build was not finished"):
        open_tensorrt(opened)
