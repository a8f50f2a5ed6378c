"""The TensorRT runtime on a double of the device that executes the same graphs from the same addresses."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tarflow.cli.doctor import _self_test
from tarflow.cli.messages import command, spell
from tarflow.runtime.backend import Branches
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.decode import serial
from tarflow.runtime.errors import BundleError, InputError, MachineError
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.tensorrt.backend import TrtBackend, open_tensorrt
from tarflow.runtime.tensorrt.cuda import Captured, Cuda, Memory
from tarflow.runtime.tensorrt.library import import_tensorrt
from tarflow.runtime.tensorrt.record import Here, Target
from tarflow.runtime.tensorrt.record_reader import read_record

from .backends import double_device
from .conftest import Exported, largest
from .device_double import DoubleCuda, DoubleTensorRT, build_double

Device = tuple[DoubleCuda, DoubleTensorRT]


@pytest.fixture
def device() -> Iterator[Device]:
    with double_device() as doubles:
        yield doubles


@pytest.fixture
def built(device: Device, copy: Exported) -> Exported:
    """built("cond", "fp32", **options of build_double): a bundle with engines for the double."""

    def build(case: str = "cond", engine: str = "fp32", **options: Any) -> Path:
        folder = copy(case, engine)
        build_double(folder, **options)
        return folder

    return build


def trt_backend(flow: Flow) -> TrtBackend:
    assert isinstance(flow.backend, TrtBackend)
    return flow.backend


def test_half_precision_engines_compute_what_onnx_runtime_does(built: Exported) -> None:
    folder = built("cond", "fp16")
    options: dict[str, Any] = {"labels": 2, "guidance": Guidance(1.0), "certify": True}
    found, expected = (Flow.open(folder, provider=name).sample(5, **options) for name in ("tensorrt", "cpu"))
    assert np.sqrt(np.mean((found - expected) ** 2)) < 5e-3


def test_a_captured_graph_gives_the_same_bits_and_nothing_crosses_the_bus_in_the_loop(
    device: Device, built: Exported
) -> None:
    cuda, _ = device
    bundle = Bundle.open(built())
    captured, plain = (Flow.open(bundle, "tensorrt", cuda_graph=on) for on in (True, False))
    first = captured.sample(3, labels=1)
    steps = bundle.manifest.config.blocks * (bundle.manifest.config.tokens - 1)
    assert cuda.calls.count("capture") == bundle.manifest.config.blocks  # one for each engine
    assert cuda.calls.count("replay") == steps - bundle.manifest.config.blocks  # all but the warm-up
    cuda.calls.clear()
    second = captured.sample(3, labels=1, denoise=False)
    assert cuda.calls.count("replay") == steps  # captured graphs serve the next batch
    assert cuda.calls.count("capture") == 0
    # Per block: z, x, labels, mix, temperature and the first position go up, the patches come down. No step adds any.
    assert cuda.calls.count("copy HostToDevice") == 6 * bundle.manifest.config.blocks
    assert cuda.calls.count("copy DeviceToHost") == bundle.manifest.config.blocks
    cuda.calls.clear()
    assert np.array_equal(plain.sample(3, labels=1), first)
    assert np.array_equal(plain.sample(3, labels=1, denoise=False), second)
    assert not {"capture", "replay"} & set(cuda.calls)


def test_batches_that_change_by_turns_are_captured_once(device: Device, built: Exported) -> None:
    """All batch sizes share a context, which loads what a size needs when it runs, not while it is captured."""
    folder = built()
    flow, cpu = Flow.open(folder, provider="tensorrt"), Flow.open(folder, provider="cpu")
    blocks = flow.config.blocks
    for turn in range(6):
        n, guidance = 2 + turn % 2, Guidance(0.5 * (turn % 3))
        expected = cpu.sample(n, labels=1, guidance=guidance)
        assert largest(flow.sample(n, labels=1, guidance=guidance), expected) < 1e-5
    assert device[0].calls.count("capture") == 4 * blocks  # of 2 and 3 images, guided and not
    z, plain = cpu.noise(0, range(3)), Branches.plain(np.zeros(3, np.int64), cpu.config.tokens)
    turns = [flow.backend.decoding(0, z[:rows], plain.of(slice(rows))) for rows in (1, 3)]
    for position in range(3):
        for decoding in turns:
            decoding.step(position)
    assert device[0].calls.count("capture") == 4 * blocks + 1  # of one image


def test_what_ends_during_a_capture_waits_for_its_end(device: Device) -> None:
    double, cuda = device[0], Cuda()
    own, held = [Memory(cuda, 8)], [Memory(cuda, 8)]
    other = threading.Thread(target=held.clear)

    def launch() -> None:
        own.clear()
        other.start()

    with cuda:
        captured = Captured(cuda, launch)
        assert len(double.allocated) == 1
    other.join()
    assert not double.allocated
    with pytest.raises(RuntimeError, match="not now"), cuda:
        Captured(cuda, _fail)
    assert double.recording is None
    assert double.graphs == {id(captured.graph)}


def _fail() -> None:
    raise RuntimeError("not now")


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_any_number_of_samples_and_images_fits_a_batch_range(built: Exported, n: int) -> None:
    folder = built(batch=(2, 3, 4))  # at least 2: single rows are padded; at most 4: more go in turns
    flow, cpu, labels = Flow.open(folder, provider="tensorrt"), Flow.open(folder, provider="cpu"), np.arange(n) % 5
    samples = cpu.sample(n, labels=labels, guidance=Guidance(0.5))
    assert largest(flow.sample(n, labels=labels, guidance=Guidance(0.5)), samples) < 1e-5
    images = np.tanh(samples)
    assert largest(flow.bits_per_dim(images, labels - 1), cpu.bits_per_dim(images, labels - 1)) < 1e-5
    assert largest(flow.denoise(images, labels - 1), cpu.denoise(images, labels - 1)) < 1e-5


def test_with_the_least_memory_one_block_is_loaded_at_a_time(built: Exported) -> None:
    flow = Flow.open(built(), provider="tensorrt", memory="least")
    flow.sample(2, labels=1)
    assert len({block for block, _ in trt_backend(flow).engines._loaded}) == 1


def test_a_captured_graph_does_not_outlive_the_engine_that_the_least_memory_lets_go(
    device: Device, built: Exported
) -> None:
    """What two threads do: each decodes a block, and each step loads its engine in place of the other's."""
    folder = built()
    flow, cpu = Flow.open(folder, provider="tensorrt", memory="least"), Flow.open(folder, provider="cpu")
    z, plain = cpu.noise(0, range(2)), Branches.plain(np.array([0, 1]), cpu.config.tokens)
    decodings = {block: flow.backend.decoding(block, z, plain) for block in (3, 2)}
    for start in range(0, cpu.config.tokens - 1, 5):
        for decoding in decodings.values():
            for position in range(start, start + 5):  # the first plain, the second captured, the others replayed
                decoding.step(position)
    for block, decoding in decodings.items():
        expected = serial(cpu.backend.decoding(block, z, plain), cpu.config.tokens)
        assert largest(decoding.patches(), expected) < 1e-5
    assert device[0].calls.count("replay") > 20


def test_scratch_that_moves_takes_captured_graphs_along(device: Device, built: Exported) -> None:
    flow = Flow.open(built(), provider="tensorrt")
    expected = flow.sample(2, labels=1, denoise=False)
    backend = trt_backend(flow)
    backend.engines._reserve(True, 1 << 20)
    assert not device[0].graphs
    assert np.array_equal(flow.sample(2, labels=1, denoise=False), expected)


def test_the_doctors_self_test_runs_engines_too(built: Exported) -> None:
    folder = built()
    result = _self_test(open_tensorrt, folder)
    assert result["ok"], result
    assert result["error"] < 1e-4
    damage(folder, "version", "11.3.0.99")
    broken = _self_test(open_tensorrt, folder)
    assert broken["ok"] is False
    assert "need tensorrt 11.3.0.99 exactly" in broken["message"]


# --- refusals ---------------------------------------------------------------------------------------------------


def refusal_of(folder: Path, message: str) -> str:
    """What the command line says when it opens these engines."""
    with pytest.raises(BundleError, match=message) as refusal:
        Flow.open(folder, provider="tensorrt")
    return spell(refusal.value)


def damage(folder: Path, path: str, value: Any) -> None:
    """Change one place of a record; "engines.*" is its first engine."""
    place = folder / "engines" / "double" / "engines.json"
    document = json.loads(place.read_text())
    inner, names = document, path.split(".")
    for name in names[:-1]:
        inner = inner[0] if isinstance(inner, list) else inner[min(inner) if name == "*" else name]
    inner[names[-1]] = value
    place.write_text(json.dumps(document))


def test_no_driver_is_one_sentence_and_no_runtime_is_made(device: Device, built: Exported) -> None:
    cuda, trt = device
    folder = built()
    for devices in (0, -1):
        cuda.devices = devices
        with pytest.raises(MachineError, match="no NVIDIA GPU can be used here") as refusal:
            Flow.open(folder, provider="tensorrt")
        assert "\n" not in str(refusal.value)
    assert trt.runtimes == 0
    description = Flow.open(folder, provider="auto").backend.description
    assert "CPU; not tensorrt: no NVIDIA GPU" in description
    assert "not cuda: " in description


def test_an_engine_that_was_changed_is_never_deserialised(device: Device, built: Exported) -> None:
    _, trt = device
    folder = built()
    flow = Flow.open(folder, provider="tensorrt")
    path = folder / "engines" / "double" / "block_03.step.engine"
    path.write_bytes(path.read_bytes().replace(b"resident", b"RESIDENT"))
    with pytest.raises(BundleError, match=r"block_03\.step\.engine' was changed after it was built"):
        flow.sample(1)
    assert trt.deserialised == 0


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("version", "11.3.0.99", "need tensorrt 11.3.0.99 exactly, here is 11.4.0.106"),
        ("package", "tensorrt_rtx", "tensorrt_rtx"),
        ("target.gpu", "NVIDIA A100", "tuned for NVIDIA A100, here is NVIDIA Double"),
        ("target.capabilities", ["8.0"], r"compute capability 8.0.*here is NVIDIA Double \(9.0\)"),
        ("bundle", "0" * 64, "built from another bundle"),
        ("engines", {}, "not finished"),
        ("engines.*.graph", "engines/double/planted.onnx", "they name graphs that this bundle does not have"),
    ],
)
def test_engines_that_do_not_fit_are_refused_with_the_command_that_rebuilds_them(
    device: Device, built: Exported, path: str, value: Any, message: str
) -> None:
    folder = built()
    damage(folder, path, value)
    assert refusal_of(folder, message).endswith(f": tarflow build {folder} --engine fp32 --batch 1,8,32")
    assert device[1].deserialised == 0


def test_the_command_that_rebuilds_names_every_flag_they_were_built_with(device: Device, built: Exported) -> None:
    options: dict[str, Any] = {"version": "11.2.0.1", "level": 3}
    folder = built("cond", "fp16", window=(1, 4, 8), batch=(1, 2, 4), target=Target(None, ("8.6",)), **options)
    rebuilding = f"tarflow build {folder} --engine fp16 --batch 1,2,4 --window 1,4,8 --device 9.0 --level 3"
    assert refusal_of(folder, "need tensorrt").endswith(rebuilding)
    record = read_record(folder / "engines" / "double")
    assert "--device 8.6 " in command(record.rebuild(folder))
    here = Here("tensorrt_rtx", "1.7", "NVIDIA Double", "9.0")
    assert "--device 8.6,9.0 " in command(record.rebuild(folder, here))
    assert "--batch 1,9,9 --window 1,3,3 " in command(record.rebuild(folder, here, batch=(1, 9, 9), window=(1, 3, 3)))


def test_auto_takes_engines_or_says_in_one_line_why_it_did_not(built: Exported) -> None:
    folder = built()
    assert Flow.open(folder, provider="auto").backend.description == "tensorrt 11.4.0.106 fp32, NVIDIA Double"
    damage(folder, "version", "11.3.0.99")
    description = Flow.open(folder, provider="auto").backend.description
    assert (
        "CPU; not tensorrt: double: they need tensorrt 11.3.0.99 exactly, here is 11.4.0.106; not cuda" in description
    )
    assert "\n" not in description
    shutil.rmtree(folder / "engines")
    assert "has no TensorRT engines; not cuda" in Flow.open(folder, provider="auto").backend.description


def test_a_batch_out_of_range_is_refused_before_anything_runs(device: Device, built: Exported) -> None:
    _, trt = device
    folder = built(batch=(1, 2, 4))
    flow = Flow.open(folder, provider="tensorrt")
    for options in ({"batch_size": 5}, {"reproducible": True}):
        with pytest.raises(InputError, match=r"4 at most, which is what these engines take") as refusal:
            flow.sample(8, **options)
        assert re.search(r"or build others: tarflow build .* --batch 1,", spell(refusal.value))
    with pytest.raises(InputError, match=r"`batch_size` is 6; expected 4 at most"):
        flow.backend.decoding(0, flow.noise(0, range(6)), Branches.plain(np.zeros(6, np.int64), 16))
    decoding = flow.backend.decoding(0, flow.noise(0, range(2)), Branches.plain(np.zeros(2, np.int64), 16))
    with pytest.raises(IndexError):
        decoding.step(15)
    with pytest.raises(InputError, match=r"windows of 1 to 1 ") as refusal:
        decoding.step(0, 3)
    assert spell(refusal.value).endswith("--batch 1,2,4 --window 1,3,3")
    assert trt.executed == 0


def test_what_tensorrt_says_comes_back_as_one_error_with_the_block(device: Device, built: Exported) -> None:
    trt, flow = device[1], Flow.open(built(), provider="tensorrt")
    trt.fail = "Error Code 1: Cask (Cask convolution execution)"
    with pytest.raises(BundleError, match=r"block 3's step engine refused to run; TensorRT says: Error Code 1: Cask"):
        flow.sample(1)
    trt.fail = "Requested amount of GPU memory (7 bytes) could not be allocated"
    with pytest.raises(MachineError, match=r"out of GPU memory in block 3's step engine; use a smaller `batch_size`"):
        flow.sample(1)
    trt.fail = None
    flow.sample(1)


def test_too_little_device_memory_is_said(device: Device, built: Exported) -> None:
    flow = Flow.open(built(), provider="tensorrt")
    device[0].memory = 100_000
    with pytest.raises(MachineError, match=r"the GPU has no .* GiB of free memory left .* smaller `batch_size`"):
        flow.sample(8)


def test_a_record_that_lies_about_the_precision_is_found_out(built: Exported) -> None:
    folder = built("cond", "fp32", precision="fp16")
    with pytest.raises(BundleError, match=r"keeps its cache as .*FLOAT.*record says fp16"):
        Flow.open(folder, provider="tensorrt").sample(1)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"\xff\xfe", b'{"format": "tarflow-engines", "schema": 2}', b"[" * 100_000],
    ids=["empty", "object", "list", "binary", "schema", "deep"],
)
def test_a_damaged_record_is_an_error_of_the_bundle(built: Exported, content: bytes) -> None:
    folder = built()
    (folder / "engines" / "double" / "engines.json").write_bytes(content)
    refusal_of(folder, r"engines\.json'( is damaged|: ).*remove '.*' and build the engines again")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("bundle", "abc", "no SHA-256"),
        ("precision", "int8", "'precision' is 'int8'; expected one of fp32, fp16, bf16"),
        ("package", "os", "'package' is 'os'; expected one of tensorrt, tensorrt_rtx"),
        ("version", "new", "'version' is 'new'"),
        ("version_compatible", 1, "'version_compatible' is int; expected bool"),
        ("version_compatible", True, "'version_compatible' is true, which this version neither builds nor runs"),
        ("strip_weights", "no", "'strip_weights' is str; expected bool"),
        ("strip_weights", True, "'strip_weights' is true"),
        ("level", 9, "'level' is 9; expected an integer from 0 to 5"),
        ("target", [], "'target' is list; expected dict"),
        ("target.gpu", 5, "'target.gpu' is 5"),
        ("target.capabilities", "9.0", "'capabilities' is str; expected list"),
        ("target.capabilities", ["sm90"], r"'target.capabilities' is \['sm90'\]"),
        ("profiles.step", [], "'profiles.step' is empty"),
        ("profiles.gradient", None, "'gradient' is NoneType; expected list"),
        ("profiles.step.0.branches", 3, "'branches' is 3"),
        ("profiles.step.0.batch", [8, 4, 1], r"'batch' is \[8, 4, 1\]; expected three integers"),
        ("profiles.step.0.batch", [1, 2, 1 << 40], "'batch' is"),
        ("profiles.step.0.window", [1, True, 1], "'window' is"),
        ("engines", [], "'engines' is list; expected dict"),
        ("engines.*.sha256", 5, "'sha256' is int; expected str"),
        ("engines.*.block", -1, "'block' is -1"),
        ("engines.*.block", 3, "2 engines are block 3's"),
        ("engines.*.kind", "steps", "'kind' is 'steps'; expected one of step, forward, gradient"),
        ("engines.*.graph", "../x.onnx", "not a plain relative path"),
        ("engines.*.seconds", "long", "'seconds' is 'long'; expected a number of 0 or more"),
        ("engines.*.parity", 0.5, "'parity' of"),
    ],
)
def test_every_field_of_a_record_is_checked_before_it_is_used(
    built: Exported, path: str, value: Any, message: str
) -> None:
    folder = built()
    damage(folder, path, value)
    with pytest.raises(BundleError, match=message) as refusal:
        read_record(folder / "engines" / "double")
    assert "double/engines.json" in str(refusal.value)
    assert refusal_of(folder, message).endswith(f"tarflow build {folder}")
    assert "ONNX Runtime" in Flow.open(folder, provider="auto").backend.description


def test_a_record_never_names_what_is_imported() -> None:
    """Reading it refuses other packages too: a row above."""
    with pytest.raises(InputError, match="'this' is no TensorRT"):
        import_tensorrt("this")
    assert "this" not in sys.modules


def test_a_damaged_folder_does_not_keep_good_engines_from_running(built: Exported) -> None:
    folder = built()
    damaged, good = folder / "engines" / "a damaged one", folder / "engines" / "double"
    shutil.copytree(good, damaged)
    (damaged / "engines.json").write_bytes(b"{")
    assert largest(Flow.open(folder, provider="tensorrt").sample(1), Flow.open(folder, provider="cpu").sample(1)) < 1e-5
    damage(folder, "version", "11.3.0.99")
    said = refusal_of(folder, "a damaged one: ")
    assert "double: they need tensorrt 11.3.0.99 exactly" in said


def test_an_engine_outside_its_folder_is_not_opened(built: Exported, tmp_path: Path) -> None:
    folder = built()
    place = folder / "engines" / "double"
    record = (place / "engines.json").read_text()
    (place / "engines.json").write_text(record.replace('"block_00.step.engine"', '"../../evil.engine"'))
    refusal_of(folder, r"is no engine's name")
    (place / "engines.json").write_text(record)
    shutil.move(place / "block_03.step.engine", tmp_path / "elsewhere.engine")
    (place / "block_03.step.engine").symlink_to(tmp_path / "elsewhere.engine")
    with pytest.raises(BundleError, match="missing or no regular file"):
        Flow.open(folder, provider="tensorrt").sample(1)
