"""The house stays as drawn: what may import what, no circle of files, a library that does not speak command line."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from tarflow.cli.main import app

from .conftest import python

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tarflow"
GROUP: Any = typer.main.get_command(app)
COMMANDS = tuple(GROUP.commands)


@dataclass(frozen=True)
class Room:
    """What files of a folder may import: other packages, and modules of ours (a name ending in * is all below it).

    ``files`` are single files that may have more: what they may import besides.
    """

    packages: str = ""
    ours: str = ""
    files: dict[str, str] = field(default_factory=dict)


ROOMS = {
    "tarflow": Room(
        "numpy torch safetensors",
        "runtime.claims runtime.files runtime.errors runtime.hub runtime.manifest",
        {"data": "tarflow.train.data", "tarflow": "runtime.flow", "__main__": "cli.main"},
    ),
    "tarflow.train": Room(
        "numpy torch sklearn",
        "checkpoint class_names config model runtime.claims runtime.files runtime.errors runtime.image runtime.picture "
        "runtime.picture_folder runtime.signals",
    ),
    "tarflow.export": Room(
        "numpy torch onnx onnx_ir onnxscript safetensors",
        "checkpoint class_names config model reference runtime* quality*",
    ),
    "tarflow.export.engines": Room("numpy onnx polygraphy", "runtime* quality* export.emulate"),
    "tarflow.runtime": Room(
        "numpy safetensors PIL",
        "",
        {
            "hub": "huggingface_hub",
            "providers": "runtime.native.backend runtime.native.choice runtime.ort.backend runtime.tensorrt.backend",
        },
    ),
    "tarflow.runtime.ort": Room("numpy", "runtime*", {"library": "onnxruntime"}),
    "tarflow.runtime.native": Room("numpy", "runtime*"),
    "tarflow.runtime.tensorrt": Room("numpy cuda", "runtime*"),
    "tarflow.shards": Room("numpy safetensors", "runtime*", {"cluster": "grpc ray"}),
    "tarflow.quality": Room("numpy PIL", "runtime*"),
    "tarflow.serve": Room(
        "numpy fastapi starlette pydantic uvicorn prometheus_client",
        "runtime* quality.scores quality.card shards.cluster",
        {"replicas": "ray", "triton_model": "triton_python_backend_utils"},
    ),
    "tarflow.cli": Room(
        "numpy typer rich torch", "checkpoint config rivals data train* export* runtime* shards* quality* serve*"
    ),
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name, rooms by way of their links."""
    files = list(PACKAGE.rglob("*.py"))
    for link in PACKAGE.iterdir():
        if link.is_symlink():
            files += link.resolve().rglob("*.py")
    return {name_of(path): path for path in files if "build" not in path.parts}


def name_of(path: Path) -> str:
    parts = list(path.resolve().relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "tarflow":
        parts = ["tarflow", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(name: str) -> str:
    path = modules()[name]
    return name if path.name == "__init__.py" else name.rpartition(".")[0]


@cache
def imports(name: str) -> frozenset[str]:
    """What a module imports, by full names, inside functions too, but not what is there for types alone."""
    tree, here = ast.parse(modules()[name].read_text()), room_of(name).split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*here[: len(here) - node.level + 1] * bool(node.level), *([node.module] if node.module else [])]
            )
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules() else base)
    return frozenset(found - {"__future__"})


def may(room: str, name: str, wanted: str) -> bool:
    """Whether a module may import another."""
    rules = ROOMS[room]
    extra = rules.files.get(name.rpartition(".")[2], "").split()
    top = wanted.split(".")[0]
    if top != "tarflow":
        return top in sys.stdlib_module_names or top in rules.packages.split() or top in extra
    if wanted == room or wanted.rpartition(".")[0] == room:
        return True
    ours = [f"tarflow.{pattern.removeprefix('tarflow.')}" for pattern in (*rules.ours.split(), *extra)]
    return any(wanted == o or (o.endswith("*") and f"{wanted}.".startswith(f"{o[:-1]}.")) for o in ours)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_the_plan_says_and_nothing_else(room: str) -> None:
    inside = [name for name in modules() if room_of(name) == room]
    assert inside, f"no files in {room}"
    strange = [f"{name} imports {wanted}" for name in inside for wanted in imports(name) if not may(room, name, wanted)]
    assert not strange


def test_every_folder_is_a_room() -> None:
    assert {room_of(name) for name in modules()} == set(ROOMS)


def test_no_circle_of_files() -> None:
    """By taking away files that import none of those left, until none is left."""
    left = {name: {wanted for wanted in imports(name) if wanted in modules() and wanted != name} for name in modules()}
    while free := {name for name, wanted in left.items() if not wanted & left.keys()}:
        left = {name: wanted for name, wanted in left.items() if name not in free}
    assert not left


# --- words ----------------------------------------------------------------------------------------------------------


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Strings of a file that are no docstrings, with their lines."""
    docstrings = set()
    for node in ast.walk(tree := ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr):
                docstrings.add(id(first.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def test_the_library_does_not_speak_command_line() -> None:
    """No string outside cli/ names a flag of ours, or tells to run one of our commands."""
    flags = {word for command in GROUP.commands.values() for option in command.params for word in option.opts}
    assert "--batch-size" in flags
    commands = "|".join(COMMANDS)
    spoken = [
        f"{name}:{line}"
        for name, path in modules().items()
        if not name.startswith("tarflow.cli")
        for line, text in texts(path)
        if flags & set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) or re.search(rf"\btarflow ({commands})\b", text)
    ]
    assert not spoken


def test_only_the_command_line_prints() -> None:
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                assert name.startswith("tarflow.cli") or "file" in {k.arg for k in node.keywords}, f"{name} prints"


def test_every_package_file_is_a_docstring_and_the_links_lead_home() -> None:
    for name, path in modules().items():
        if path.name == "__init__.py" and name != "tarflow":  # which is a door, lazy
            tree = ast.parse(path.read_text())
            assert len(tree.body) == 1, name
            assert ast.get_docstring(tree), name
    for link in PACKAGE.iterdir():
        if link.is_symlink():
            assert link.resolve() == ROOT / link.name


def test_the_door_is_lazy_typed_and_a_command_too() -> None:
    done = python(
        "-c",
        "import sys, tarflow\n"
        "heavy = {'numpy', 'onnxruntime', 'PIL', 'typer', 'tarflow.runtime', 'tarflow.cli'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(tarflow.__all__) <= set(dir(tarflow))\n"
        "from tarflow import Flow, Guidance, __version__\n"
        "from importlib.metadata import version\n"
        "from tarflow.runtime import flow\n"
        "assert (Flow, Guidance, __version__) == (flow.Flow, flow.Guidance, version('tarflow'))\n"
        "assert not hasattr(tarflow, 'Flows')",
    )
    assert done.returncode == 0, done.stderr
    assert (PACKAGE / "py.typed").exists()
    said = python("-m", "tarflow", "--version")
    assert (said.returncode, said.stdout.split()[0]) == (0, "tarflow"), said.stderr


def test_sampling_works_with_pytorch_and_onnx_absent() -> None:
    done = python(
        "-c",
        "import sys\nfor name in ('torch', 'onnx', 'onnxscript', 'onnx_ir', 'sklearn'): sys.modules[name] = None\n"
        "from tarflow.runtime.flow import Flow\nfrom tarflow.cli.console import DEMO\n"
        "from tarflow.quality.parity import verify_golden\n"
        "flow = Flow.open(DEMO)\nprint(flow.sample(2).shape, verify_golden(flow).failures())",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 1, 8, 8) []"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_light_and_has_an_example(command: str) -> None:
    done = python(
        "-c",
        "import sys\n"
        f"sys.argv = ['tarflow', *{command!r}.split(), '--help']\n"
        "from tarflow.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'PIL', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy",
    )
    assert done.returncode == 0, done.stderr
    if command:
        assert "Example: tarflow " in done.stdout
    else:
        assert all(name in done.stdout for name in COMMANDS)


def test_every_command_is_in_the_readme_and_the_readme_names_no_other() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`tarflow ([a-z-]+)", text)) | set(re.findall(r"^tarflow ([a-z-]+)", text, re.M))
    assert named == set(COMMANDS)
