"""A limit on memory chooses batches and sub-batches, and is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.weights import random_model
from tarflow import checkpoint
from tarflow.config import Config
from tarflow.export.pipeline import export
from tarflow.runtime.bundle import WEIGHTS, Bundle
from tarflow.runtime.errors import InputError
from tarflow.runtime.flow import Flow
from tarflow.runtime.memory import packed, peak, spend
from tarflow.runtime.opening import Opening, parse_memory

from .conftest import DEMO, Cli, python, report_of

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("8GiB", 8 << 30), ("512MB", 512 * MIB), ("1.5g", 3 << 29), ("4096", 4096), (" 2 TiB ", 2 << 40)),
        *(("least", "least"), (None, None)),
    ],
)
def test_sizes_are_read(text: str | None, size: int | str | None) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GiB", "8 gigabytes", "GiB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="8GiB"):
        parse_memory(text)


def test_an_opening_takes_the_sizes_that_the_command_line_takes() -> None:
    assert Opening(memory="1.5GiB") == Opening(memory=3 << 29)  # type: ignore[arg-type]
    assert Flow.open(DEMO, memory="400MiB").budget == Flow.open(DEMO, memory=400 * MIB).budget
    with pytest.raises(InputError, match="`memory` is 'little'; expected a number of bytes, a size such as 8GiB"):
        Flow.open(DEMO, memory="little")


def test_a_limit_shrinks_batches_then_keeps_one_block_and_at_last_refuses() -> None:
    opened = Bundle.open(DEMO)
    usual, tight = spend(opened, None), spend(opened, 290 * MIB)
    assert tight.cache < usual.cache
    assert tight.activations < usual.activations
    limits = [spend(opened, size * MIB).one_block for size in (400, 270)]
    assert limits == [False, True]
    with pytest.raises(InputError, match=r"its gradient are estimated, on the safe side, at 2\d\d\.\d MiB"):
        spend(opened, 200 * MIB)
    assert spend(opened, "least").one_block


def test_samples_do_not_depend_on_the_limit() -> None:
    free, tight = Flow.open(DEMO), Flow.open(DEMO, memory=280 * MIB)
    expected, found = (flow.sample(40, labels=3, certify=True) for flow in (free, tight))
    assert np.abs(expected - found).max() < 1e-5
    assert 0 < report_of(found).peak_memory <= peak()


def test_the_gradient_of_long_sequences_stays_below_the_limit(tmp_path: Path, cli: Cli) -> None:
    config = Config(image_size=64, channels=1, patch_size=2, width=64, blocks=1, layers=1, classes=2, noise_std=0.1)
    checkpoint.save(random_model(config), tmp_path / "long.safetensors")
    export(tmp_path / "long.safetensors", tmp_path / "long", check=False)
    images = np.zeros((32, *Bundle.open(tmp_path / "long").manifest.config.image), np.float32)
    np.save(tmp_path / "x.npy", images)

    def peak_of(memory: int | None) -> int:  # in a process of its own
        code = (
            "import sys, numpy; from tarflow.runtime.flow import Flow; from tarflow.runtime.memory import peak\n"
            f"Flow.open('long', memory={memory}).denoise(numpy.load('x.npy'), [0, 1] * 16); print(peak())"
        )
        done = python("-c", code, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    limit = 600 * MIB
    assert peak_of(limit) < limit < peak_of(None)
    refused = cli("denoise", tmp_path / "long", tmp_path / "x.npy", "--memory", "100MiB")
    assert (refused.returncode, "too little" in refused.stderr) == (2, True), refused.stderr


_LIMITED = """
import hashlib, os, resource, sys
import onnxruntime, safetensors.numpy
import tarflow.runtime.ort.backend
from tarflow.runtime.errors import MachineError
from tarflow.runtime.flow import Flow

bundle, which, value = sys.argv[1], sys.argv[2], int(sys.argv[3])
if which == "AS":
    value = (value << 20) + resource.getpagesize() * int(open("/proc/self/statm").read().split()[0])
elif which == "NPROC" and not os.getuid():
    os.setuid(65534)  # root has no such limit
resource.setrlimit(getattr(resource, f"RLIMIT_{which}"), (value, value))
try:
    Flow.open(bundle, "cpu", threads=2).sample(2)
except (MachineError, MemoryError, OSError):
    sys.exit(3)
"""


@pytest.mark.parametrize(
    "limits", [("NOFILE", 3), ("AS", 1, 8, 20, 60, 120), ("NPROC", 0, 1)], ids=lambda limits: limits[0]
)
def test_a_limit_of_the_machine_is_not_the_bundle_s_fault(limits: tuple[str, int]) -> None:
    which, *values = limits
    for value in values:
        done = python("-c", _LIMITED, DEMO, which, value)
        assert done.returncode == 3, (which, value, done.stderr)


def test_a_limit_knows_what_the_native_engine_packs() -> None:
    opened = Bundle.open(DEMO)
    weights = opened.manifest.files[WEIGHTS].size
    assert 0.9 * weights < packed(opened.manifest.config, "fp32") < weights
    one_block = {name: spend(opened, 274 * MIB, name).one_block for name in ("fp32", "int8")}
    assert one_block == {"fp32": True, "int8": False}
