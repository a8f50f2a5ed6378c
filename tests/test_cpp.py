"""What libtarflow has beyond what every way to run a bundle does alike, and its package as others meet it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tarflow.runtime.errors import BundleError, InputError
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.image import to_uint8
from tarflow.runtime.noise import normal

from . import cpp_library
from .conftest import DEMO, Exported, largest
from .cpp_library import LIBRARY, SOURCE, CppError, CppFlow, onnxruntime_library

NATIVE = {  # hashes of 64 guided samples of the demo, before denoising: on any processor, in Python too
    "fp32": "a879644a0b4f7130",
    "int16": "031eab069c9803c6",
    "int8": "c74c5cf47ab67274",
}


@pytest.fixture(scope="session", autouse=True)
def built() -> None:
    assert LIBRARY.exists(), f"{LIBRARY} is missing; build it: make cpp-dev"


def test_noise_is_pythons_to_the_last_bit(demo: Path) -> None:
    flow, rng = CppFlow(demo), np.random.default_rng(0)
    numbers = flow.shape.tokens * flow.shape.patch_dim
    for _ in range(300):  # anywhere among seeds and indices
        seed, first = (int(x) for x in rng.integers(0, 2**64 - 2, 2, np.uint64))
        assert np.array_equal(flow.noise(seed, first, 2).reshape(2, -1), normal(seed, [first, first + 1], (numbers,)))
    n = 40_000
    for _ in range(0, 10_000_000, n * numbers):
        seed, first = (int(x) for x in rng.integers(0, 2**63, 2))
        assert np.array_equal(
            flow.noise(seed, first, n).reshape(n, -1), normal(seed, range(first, first + n), (numbers,))
        )


@pytest.mark.parametrize(
    ("case", "engine"), [("demo", "fp32"), ("demo", "fp16"), ("demo", "int8"), ("vp", "fp32"), ("uncond", "fp32")]
)
def test_likelihood_and_samples_agree_in_other_bundles(bundle: Exported, case: str, engine: str) -> None:
    python, cpp = Flow.open(bundle(case, engine), provider="cpu"), CppFlow(bundle(case, engine))
    labels = np.arange(5) % python.config.classes if python.config.classes else None
    images = python.sample(5, labels=labels, seed=1)
    assert largest(cpp.sample(5, labels=labels, seed=1), images) < 1e-5
    assert largest(cpp.log_likelihood(images, labels), python.log_likelihood(images, labels)) < 1e-2


@pytest.mark.parametrize("precision", NATIVE)
@pytest.mark.parametrize("batch_size", [0, 3])
def test_native_samples_are_those_of_every_other_machine(precision: str, batch_size: int) -> None:
    flow = CppFlow(DEMO, provider=b"native", precision=precision.encode(), threads=1 + batch_size)
    images = flow.sample(64, labels=np.arange(64) % 10, guidance=1.0, denoise=0.0, batch_size=batch_size)
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == NATIVE[precision]


@pytest.mark.parametrize(
    ("engine", "precision", "limit"), [("fp16", "fp32", 5e-3), ("int8", "fp32", 0.1), ("int8", "int8", 0.1)]
)
def test_native_decoding_reads_weights_of_other_bundles(
    bundle: Exported, demo: Path, engine: str, precision: str, limit: float
) -> None:
    expected = Flow.open(demo).sample(10, labels=range(10), denoise=False)
    flow = CppFlow(bundle("demo", engine), provider=b"native", precision=precision.encode())
    assert 0 < largest(flow.sample(10, labels=range(10), denoise=0.0), expected) < limit


@pytest.mark.parametrize("provider", [None, b"", b"auto"])
def test_without_a_provider_it_is_the_native_engine_as_in_python(provider: bytes | None) -> None:
    flow = CppFlow(DEMO, provider=provider)
    assert flow.shape.backend.startswith(b"native fp32 (")
    python = Flow.open(DEMO)
    assert np.array_equal(
        flow.sample(3, labels=[1, 2, 3], denoise=0.0), python.sample(3, labels=[1, 2, 3], denoise=False)
    )
    assert CppFlow(DEMO, provider=provider, precision=b"int16").shape.backend.startswith(b"native int16 (")


def test_a_bf16_bundle_is_refused_on_a_cpu_with_what_to_do(bundle: Exported) -> None:
    with pytest.raises(CppError, match="no bf16 matrix product on CPUs; open it with `provider` cuda"):
        CppFlow(bundle("uncond", "bf16"))


def opens(runtime: Callable[[Path], object], folder: Path) -> bool:
    """Whether one runtime takes a bundle; one that it refuses, it must refuse as a bundle."""
    try:
        runtime(folder)
    except BundleError:
        return False
    except CppError as error:
        if error.status != cpp_library.BUNDLE:
            raise
        return False
    return True


def test_bundles_that_python_refuses_are_refused(demo: Path, tmp_path: Path) -> None:
    """Flipped and cut bytes of the manifest: whatever one runtime opens, the other does."""
    rng = np.random.default_rng(1)
    content = (demo / "manifest.json").read_bytes()
    folder = tmp_path / "bundle"
    shutil.copytree(demo, folder)
    refused = 0
    for _ in range(150):
        changed = bytearray(content[: rng.integers(len(content))] if rng.random() < 0.2 else content)
        for _ in range(rng.integers(1, 3)):
            if changed:
                changed[rng.integers(len(changed))] = content[rng.integers(len(content))]
        (folder / "manifest.json").write_bytes(changed)
        taken = opens(CppFlow, folder)
        assert taken == opens(Flow.open, folder), bytes(changed)
        refused += not taken
    assert 50 < refused < 150


@pytest.mark.parametrize(
    "options",
    [
        {"labels": 10},
        {"guidance": 1.5},
        {"labels": 1, "guidance": -1.5},
        {"labels": 1, "guidance": 1.5, "guided": b"x"},
        {"labels": 1, "guidance": 1.5, "attention_temperature": -0.5},
        {"labels": 1, "attention_temperature": 0.5},
        {"labels": 1, "denoise": -3.5},
    ],
)
def test_what_python_refuses_is_refused_in_the_same_words(demo: Path, options: dict[str, Any]) -> None:
    """But for the fields that have other names in C."""
    said = {"labels": None, "denoise": None, "guidance": 0.0, "guided": b"ab", "attention_temperature": 1.0} | options
    with pytest.raises(InputError) as python:
        Flow.open(demo).sample(
            2,
            labels=said["labels"],
            denoise=said["denoise"],
            guidance=Guidance(said["guidance"], said["guided"].decode(), False, said["attention_temperature"]),
        )
    with pytest.raises(CppError) as refused:
        CppFlow(demo).sample(2, **options)
    assert refused.value.status == cpp_library.INPUT
    assert str(refused.value) == str(python.value).replace("`scale`", "`guidance`").replace("`what`", "`guided`")


@pytest.mark.parametrize(("provider", "threads"), [("native", 65), ("native", 1000), ("cpu", 65537)])
def test_more_threads_than_an_engine_has_are_refused_in_the_same_words(demo: Path, provider: str, threads: int) -> None:
    with pytest.raises(InputError) as python:
        Flow.open(demo, provider=provider, threads=threads)
    with pytest.raises(CppError) as refused:
        CppFlow(demo, provider=provider.encode(), threads=threads)
    assert refused.value.status == cpp_library.INPUT
    assert str(refused.value) == str(python.value).replace("nothing for", "0 for")


def test_the_headers_example_compiles_without_a_warning(tmp_path: Path) -> None:
    header = (SOURCE / "include" / "tarflow.h").read_text()
    (tmp_path / "example.c").write_text(header[header.index("#include <stdio.h>") : header.index("   Threads: ")])
    command = [
        "cc",
        "-std=c11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        "-I",
        str(SOURCE / "include"),
        "example.c",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)


def test_the_header_says_what_this_file_believes(tmp_path: Path) -> None:
    """Sizes and offsets of the structs, as a C compiler sees them."""
    structs = {
        "tarflow_open_options": cpp_library.OpenOptions,
        "tarflow_shape": cpp_library.Shape,
        "tarflow_sample_options": cpp_library.SampleOptions,
    }
    fields = [(struct, name) for struct, python in structs.items() for name, *_ in python._fields_]
    lines = [f'printf("%zu ", offsetof({struct}, {name}));' for struct, name in fields]
    lines += [f'printf("%zu ", sizeof({struct}));' for struct in structs]
    code = "#include <stdio.h>\n#include <tarflow.h>\nint main(void) {" + "\n".join(lines) + "return 0; }"
    (tmp_path / "layout.c").write_text(code)
    command = ["cc", "-I", str(SOURCE / "include"), "layout.c", "-o", "layout"]
    subprocess.run(command, cwd=tmp_path, check=True)
    found = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout.split()
    expected = [getattr(structs[struct], name).offset for struct, name in fields]
    assert [int(x) for x in found] == expected + [ctypes.sizeof(python) for python in structs.values()]


# --- the package, as a downstream project meets it ----------------------------------------------------------------


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of an installed dev build."""
    prefix = tmp_path_factory.mktemp("prefix")
    command = ["cmake", "--install", str(LIBRARY.parent), "--prefix", str(prefix)]
    subprocess.run(command, check=True, capture_output=True)
    return prefix


def draws_a_three(program: Path, tmp_path: Path, library: Path) -> bool:
    """Whether the example writes the picture of what Python draws."""
    environment = {"TARFLOW_ONNXRUNTIME": onnxruntime_library(), "LD_LIBRARY_PATH": str(library)}
    command = [str(x) for x in (program, DEMO, 3, 7, tmp_path / "three.pgm")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    pixels = to_uint8(Flow.open(DEMO).sample(1, labels=3, seed=7))[0, 0]
    expected: bytes = b"P5 %d %d 255\n" % pixels.shape + pixels.tobytes()
    return (tmp_path / "three.pgm").read_bytes() == expected


DOWNSTREAM = """
cmake_minimum_required(VERSION 3.24)
project(downstream LANGUAGES C CXX)
find_package(tarflow 0.1 REQUIRED)
add_executable(shared {source})
target_link_libraries(shared PRIVATE tarflow::tarflow)
add_executable(static {source})
target_link_libraries(static PRIVATE tarflow::tarflow_static)
set_target_properties(static PROPERTIES LINKER_LANGUAGE CXX)
"""


def test_a_project_uses_the_installed_package_through_find_package(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(DOWNSTREAM.format(source=SOURCE / "examples" / "sample.c"))
    configure = ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build"), f"-DCMAKE_PREFIX_PATH={installed}"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path / "build"], check=True, capture_output=True)
    for program in ("shared", "static"):
        assert draws_a_three(tmp_path / "build" / program, tmp_path, Path("/nowhere"))


def test_a_project_uses_the_installed_package_through_pkg_config(installed: Path, tmp_path: Path) -> None:
    (pc,) = installed.rglob("tarflow.pc")
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "tarflow"],
        env={"PKG_CONFIG_PATH": str(pc.parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    command = ["cc", str(SOURCE / "examples" / "sample.c"), "-o", str(tmp_path / "sample"), *flags]
    subprocess.run(command, check=True)
    assert draws_a_three(tmp_path / "sample", tmp_path, pc.parent.parent)
    strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", *flags]
    (tmp_path / "both.hpp").write_text("#include <tarflow.hpp>\nint drawn(tarflow::Flow& flow);\n")
    subprocess.run(["c++", "-std=c++17", "-x", "c++", str(tmp_path / "both.hpp"), *strict], check=True)
    subprocess.run(["cc", "-std=c99", str(SOURCE / "examples" / "sample.c"), *strict], check=True)


def test_only_the_c_api_is_exported() -> None:
    listing = subprocess.run(["nm", "-D", "--defined-only", LIBRARY], capture_output=True, text=True, check=True)
    names = {line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()} - {"TARFLOW_1"}
    header = (SOURCE / "include" / "tarflow.h").read_text()
    assert names == set(re.findall(r"^TARFLOW_API .*?(tarflow_\w+)\(", header, re.M))


def test_the_headers_stay_small() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in (SOURCE / "include").iterdir()}
    assert lines["tarflow.h"] <= 220
    assert lines["tarflow.hpp"] <= 170


def test_the_readmes_five_minutes_are_true(tmp_path: Path) -> None:
    root = SOURCE.parent.parent
    section = (root / "README.md").read_text().split("## C++ in five minutes")[1].split("\n## ")[0]
    build, program, use = (part.split("```")[0] for part in re.split(r"```(?:sh|cpp)\n", section)[1:])
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(root / "tarflow" / "demo", tmp_path / "tarflow" / "demo")
    shutil.copytree(SOURCE, tmp_path / "runtime" / "cpp", ignore=shutil.ignore_patterns("build"))
    shutil.copytree(SOURCE.parent / "native" / "src", tmp_path / "runtime" / "native" / "src")
    shutil.copy(SOURCE.parent / "operators.txt", tmp_path / "runtime")
    (tmp_path / "draw.cpp").write_text(program)
    environment = os.environ | {
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ONNXRUNTIME_ROOT": str(SOURCE / "build" / "onnxruntime"),
    }
    script = f"set -e\n{build}\n{use.replace('pip install', 'true')}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^192 numbers, round-trip error \S+e-0[67]$", done.stdout, re.M), done.stdout
