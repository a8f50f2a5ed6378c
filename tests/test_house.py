"""The house stays as drawn: what may import what, and a runtime that needs no PyTorch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "tarflow": ROOT / "tarflow",
    "export": ROOT / "export",
    "runtime": ROOT / "runtime",
    "serve": ROOT / "serve",
    "cli": ROOT / "cli",
}
RUNTIME_MAY = {"numpy", "onnxruntime", "PIL", "safetensors", "cuda", "ray"}
COMMANDS = (
    "export",
    "build",
    "check-engine",
    "generate",
    "train",
    "verify",
    "bisect",
    "likelihood",
    "denoise",
    "inspect",
    "doctor",
    "bench",
    "calibrate",
    "evaluate",
    "report",
    "package",
    "serve",
)


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import in a file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def absolute(room: str, level: int, module: str) -> str:
    """The full name a relative import in a file of ``room`` means."""
    if level == 0:
        return module
    inside = "tarflow" if room == "tarflow" else f"tarflow.{room}"
    base = inside.split(".")[: len(inside.split(".")) - level + 1]
    return ".".join([*base, module]).rstrip(".")


def modules_of(room: str) -> list[tuple[str, str]]:
    return [
        (path.name, absolute(room, level, module))
        for path in sorted(ROOMS[room].glob("*.py"))
        for level, module in imports(path)
    ]


def test_the_model_knows_nothing_of_export_runtime_and_cli() -> None:
    for name, module in modules_of("tarflow"):
        assert not module.startswith(("tarflow.export", "tarflow.runtime", "tarflow.cli")), f"{name} imports {module}"


def test_the_runtime_imports_relatively_and_knows_neither_model_nor_torch() -> None:
    standard = sys.stdlib_module_names
    for path in sorted(ROOMS["runtime"].glob("*.py")):
        for level, module in imports(path):
            assert level <= 1, f"{path.name} reaches out of the runtime"
            if level == 0:
                top = module.split(".")[0]
                assert top in standard or top in RUNTIME_MAY, f"{path.name} imports {module}"


def test_serving_stands_on_the_runtime_alone() -> None:
    for name, module in modules_of("serve"):
        assert not module.startswith(("tarflow.cli", "tarflow.export", "torch", "onnx.")), f"{name} imports {module}"


def test_export_does_not_know_the_command_line_and_only_cli_prints() -> None:
    for name, module in modules_of("export"):
        assert not module.startswith("tarflow.cli"), f"{name} imports {module}"
    for room in ("export", "runtime", "serve"):
        for path in sorted(ROOMS[room].glob("*.py")):
            assert not re.search(r"^\s*print\(", path.read_text(), re.M), f"{path} prints"


def test_serve_stands_on_the_runtime_alone() -> None:
    for name, module in modules_of("serve"):
        assert not module.startswith(("tarflow.cli", "tarflow.export", "torch", "onnx")), f"{name} imports {module}"


def test_every_package_file_is_a_docstring_and_the_links_lead_home() -> None:
    for room, folder in ROOMS.items():
        tree = ast.parse((folder / "__init__.py").read_text())
        assert len(tree.body) == 1
        assert ast.get_docstring(tree)
        if room != "tarflow":
            assert (ROOT / "tarflow" / room).resolve() == folder.resolve()


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_sampling_works_with_pytorch_and_onnx_absent() -> None:
    blocked = (
        "import sys\nfor name in ('torch', 'onnx', 'onnxscript', 'onnx_ir', 'sklearn'): sys.modules[name] = None\n"
    )
    done = run(
        blocked + "sys.argv = ['tarflow', 'generate', '--n', '2', '--save', '/dev/null/none', '--json']\n"
        "from tarflow.runtime.flow import Flow\nfrom tarflow.cli.console import DEMO\n"
        "from tarflow.quality.parity import failures, verify_golden\n"
        "flow = Flow.open(DEMO)\nprint(flow.sample(2).shape, failures(verify_golden(flow)))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 1, 8, 8) []"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_light_and_has_an_example(command: str) -> None:
    done = run(
        "import sys\n"
        f"sys.argv = ['tarflow', *{command!r}.split(), '--help']\n"
        "from tarflow.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'PIL', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
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
