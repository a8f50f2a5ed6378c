"""What goes to a GPU machine without network, and what the stand-in for CUDA wrote, as far as neither is needed."""

from __future__ import annotations

import lzma
import struct
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu.checkout import ROOT
from bench.gpu.fatbin import CONTAINER, IMAGE, MAGIC, blank, images
from bench.gpu.prepare import Archive, of_bundle
from bench.gpu.standin import log
from bench.gpu.unpack import unpack
from bench.weights import random_model, repeat
from tarflow.config import Config

from .conftest import python

HEADER, CODE = 64, 24
ADDRESS = 0x5000  # where the section is loaded


def container(*codes: tuple[int, bytes]) -> bytes:
    """One container with an image of the code for each capability."""
    parts = b"".join(
        IMAGE.pack(2, 0x101, HEADER, len(code), capability).ljust(HEADER, b"\0") + code for capability, code in codes
    )
    return CONTAINER.pack(MAGIC, 1, CONTAINER.size, len(parts)) + parts


def library(code: bytes, name: bytes = b".nv_fatbin") -> bytes:
    """A 64-bit ELF file of two sections: device code, and the names of both."""
    names = (b"\0" + name + b"\0.shstrtab\0").ljust(32, b"\0")  # so that code is aligned
    start = 64 + len(names)
    table = start + len(code)
    section = struct.Struct("<IIQQQQIIQQ")
    head = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 0, table, 0, 64, 0, 0, section.size, 2, 1
    )
    device = section.pack(1, 1, 2, ADDRESS, start, len(code), 0, 0, 8, 0)
    strings = section.pack(2 + len(name), 3, 0, 0, 64, len(names), 0, 0, 1, 0)
    return head + names + code + device + strings


def test_only_code_for_the_capability_in_the_containers_asked_for_is_left() -> None:
    first, second = container((80, b"a" * CODE), (90, b"b" * CODE)), container((90, b"c" * CODE))
    whole = library(first + bytes(8) + second)
    found = list(images(whole))
    codes = [(image.capability, whole[image.start : image.start + image.size]) for image in found]
    assert codes == [(80, b"a" * CODE), (90, b"b" * CODE), (90, b"c" * CODE)]
    assert [image.address - ADDRESS for image in found] == [0, 0, len(first) + 8]
    lean = bytearray(whole)
    assert blank(lean, 90, {ADDRESS}) == CODE
    assert bytes(lean) == whole.replace(b"a" * CODE, bytes(CODE)).replace(b"c" * CODE, bytes(CODE))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"MZ" + bytes(64), "no 64-bit ELF"),
        (library(b"", b".text"), "no device code"),
        (library(container((90, b"a" * CODE))[: -CODE // 2]), "not as expected"),
    ],
)
def test_what_is_no_such_library_is_refused(file: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(images(file))


def test_what_was_packed_is_unpacked_once_and_used(tmp_path: Path) -> None:
    module, bundle = tmp_path / "module.py", tmp_path / "some-bundle"
    module.write_text("print('packed')")
    (bundle / "engines").mkdir(parents=True)
    (bundle / "engines" / "one").write_bytes(bytes(1000))
    packed, site = tmp_path / "packed", tmp_path / "site"
    packed.mkdir()
    for archive in [of_bundle(bundle), Archive("python", {"module_of_ours.py": module})]:
        assert archive.write(packed) > 0
    inner = [sys.executable, "-c", "import module_of_ours"]
    done = python("-m", "bench.gpu.unpack", packed, "--to", site, "--", *inner, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "packed\n"), done.stderr
    assert (site / "bundles" / "some-bundle" / "engines" / "one").read_bytes() == bytes(1000)
    (site / "module_of_ours.py").write_text("changed")
    unpack([packed], site)
    assert (site / "module_of_ours.py").read_text() == "changed"
    with pytest.raises(SystemExit, match=r"expected what bench\.gpu\.prepare wrote"):
        unpack([site], site)


def test_weights_that_repeat_pack_small() -> None:
    usual = random_model(Config(8, 3, 2, width=64, blocks=2, layers=1, classes=4, noise_std=0.1))
    repeated = repeat(random_model(usual.config), period=997)

    def packed(model: torch.nn.Module) -> int:
        return len(lzma.compress(b"".join(p.detach().half().numpy().tobytes() for p in model.parameters())))

    assert packed(repeated) < packed(usual) / 5
    for name, weights in repeated.named_parameters():
        if weights.numel() > 997:
            spread = dict(usual.named_parameters())[name].std()
            assert 0.6 < weights.std() / spread < 1.6, name


def test_the_log_of_the_stand_in_is_read() -> None:
    lines = """\
7 cudaMalloc bytes=100
7 allocated bytes=100 at=0x10
7 note at=first
7 kernel container=3 grid=1,1,1 name=_Z1kv stream=0x1 captured
8 cudaMemcpy bytes=4 from=pageable to=device bad=unsafe
7 note at=second
7 released bytes=40 at=0x20
7 absent call=cudaNothing"""
    events = [log.event(line) for line in lines.splitlines()]
    assert log.allocated(events) == 60
    assert log.bad(events) == {"cudaMemcpy, unsafe": 1}
    assert log.absent(events) == ["cudaNothing"]
    kernel, copy = log.part(events, "first")
    assert (kernel.call, kernel.captured, kernel.values["container"], kernel.bad) == ("kernel", True, "3", "")
    assert (copy.thread, copy.captured, copy.bad) == (8, False, "unsafe")
    assert log.calls(events, "cudaMalloc", "cudaMemcpy") == 2
