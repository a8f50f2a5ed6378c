"""Fixtures: golden cases of the reference implementation, bundles exported from them once a session, the demo."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray
from safetensors.numpy import load_file

if TYPE_CHECKING:
    from tarflow.runtime.flow import Flow
    from tarflow.runtime.samples import Report, Samples

GOLDEN = Path(__file__).parent / "golden"
DEMO = Path(__file__).parent.parent / "tarflow" / "demo"
Done = subprocess.CompletedProcess[str]
Cli = Callable[..., Done]
Exported = Callable[..., Path]


@dataclass(frozen=True, slots=True)
class Golden:
    """One case: a checkpoint as the reference trainer saves it, and what the reference computes with it."""

    checkpoint: Path
    case: dict[str, Any]
    vectors: dict[str, NDArray[Any]]

    @property
    def labels(self) -> NDArray[Any] | None:
        return self.vectors.get("labels")

    def raw(self, run: int) -> NDArray[Any]:
        """The last image of a sampling run: the raw sample."""
        last = max(int(name.split("seq")[1]) for name in self.vectors if name.startswith(f"sample{run}.seq"))
        return self.vectors[f"sample{run}.seq{last}"]


Goldens = Callable[[str], Golden]


@pytest.fixture(scope="session")
def golden() -> Goldens:
    """golden("cond" | "uncond" | "vp")."""

    def load(name: str) -> Golden:
        folder = GOLDEN / name
        (checkpoint,) = folder.glob("*.pth")
        case = json.loads((folder / "case.json").read_text())
        return Golden(checkpoint, case, load_file(folder / "vectors.safetensors"))

    return load


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Exported:
    """bundle(case, engine): exported once for all workers; read-only, copy it before damaging it.

    ``case`` is a golden case, or "demo" for the demo model.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def export_once(name: str, engine: str = "fp32") -> Path:
        from tarflow.export.pipeline import export

        if (name, engine) == ("demo", "fp32"):
            return DEMO
        folder = shared / f"{name}-{engine}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                source = DEMO if name == "demo" else next((GOLDEN / name).glob("*.pth"))
                export(source, folder, engine)
        return folder

    return export_once


@pytest.fixture
def copy(bundle: Exported, tmp_path: Path) -> Exported:
    """copy("cond", "fp16"): a bundle of one's own, to be changed."""

    def make(case: str = "cond", engine: str = "fp32") -> Path:
        return shutil.copytree(bundle(case, engine), tmp_path / f"{case}-{engine}")

    return make


def amend(folder: Path, *names: str) -> None:
    """Make a bundle's manifest agree with files that were changed, or own new ones; without names, with all it has."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name in names or manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="session")
def demo() -> Path:
    return DEMO


def python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="session")
def flow() -> Flow:
    """The demo, opened on one thread."""
    from tarflow.runtime.flow import Flow

    return Flow.open(DEMO, threads=1)


@pytest.fixture
def anyio_backend() -> str:
    """What runs the tests that are coroutines."""
    return "asyncio"


@pytest.fixture(scope="session")
def cli() -> Cli:
    """cli("generate", ...): the real command in a process of its own."""

    def run(*args: object, timeout: float = 300, **options: Any) -> Done:
        return python("-m", "tarflow.cli.main", *args, timeout=timeout, **options)

    return run


def said(done: Done) -> Any:
    """The JSON document of a command that went well."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(done: Done, code: int, *words: str) -> str:
    """Check how a command failed, and return its message."""
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert "Traceback" not in done.stderr
    message = "\n" + done.stderr
    message = message[message.index("\ntarflow: error: ") + 1 :]
    for word in words:
        assert word in message
    return message


@pytest.fixture
def tarflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """tarflow("generate", ...) in this process, in a folder of its own, in which a failure may change nothing."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Done:
        from tarflow.cli.main import main

        monkeypatch.setattr(sys, "argv", ["tarflow", *map(str, args)])
        before, terminate = sorted(tmp_path.rglob("*")), signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGTERM, terminate)
        if ended.value.code:
            assert sorted(tmp_path.rglob("*")) == before, "a failure left something behind"
        code = ended.value.code or 0
        assert isinstance(code, int)
        return Done(sys.argv, code, *capsys.readouterr())

    return run


def report_of(samples: Samples) -> Report:
    """How they were drawn: of what a flow drew there is always a report, of what is derived there is none."""
    assert samples.report is not None
    return samples.report


def until(true: Callable[[], object]) -> None:
    """Wait for what another thread or process will do; how long that takes is nobody's concern but for ever."""
    turn = threading.Event()
    for _ in range(60_000):  # ten minutes
        if true():
            return
        turn.wait(0.01)
    raise AssertionError("it did not happen")


def largest(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest absolute difference."""
    return float(np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).max())
