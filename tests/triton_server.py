"""A real Triton server, of the wheel nvidia-pytriton in .env-oldest, on a model repository."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tritonclient.http

from .conftest import until

OLDEST = Path(__file__).parent.parent / ".env-oldest"
_STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    http: str  # 127.0.0.1:PORT
    grpc: str
    log: Path

    def stop(self) -> int:
        """Its exit code, after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait()

    def kill(self) -> None:
        """End what is left of it and its models' processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def serving(repository: Path, folder: Path, environment: Path = OLDEST) -> Iterator[Server]:
    """Triton on ``repository``, begun but perhaps not ready, its models run by the Python of ``environment``.

    What it writes lies in ``folder``.
    """
    if not (OLDEST / "done").exists():
        pytest.skip("no Triton here: make .env-oldest/done")
    (package,) = OLDEST.glob("lib/python3.*/site-packages")
    triton = package / "pytriton" / "tritonserver"
    backend = folder / "backends" / "python"
    shutil.copytree(triton / "backends" / "python", backend)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copyfile(triton / "python_backend_stubs" / version / _STUB, backend / _STUB)
    (backend / _STUB).chmod(0o755)
    libraries = [package / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    log = folder / "triton.log"
    with _held_port() as http, _held_port() as grpc, log.open("wb") as output:
        command = [str(triton / "bin" / "tritonserver"), f"--model-repository={repository}", "--allow-metrics=false"]
        command += [f"--backend-directory={backend.parent}", "--exit-timeout-secs=600"]
        for name, port in (("http", http), ("grpc", grpc)):
            command += [f"--{name}-address=127.0.0.1", f"--{name}-port={port}", f"--reuse-{name}-port=true"]
        paths = {
            "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",  # the first python3 there is the models' Python
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        }
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | paths, start_new_session=True
        )
        server = Server(process, f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log)
        try:
            yield server
        finally:
            server.kill()


def wait_until_ready(server: Server) -> None:
    until(lambda: _ready(server))


def _ready(server: Server) -> bool:
    """Whether the server answers for all its models; AssertionError with its log if it has ended."""
    assert server.process.poll() is None, server.log.read_text()
    with (
        contextlib.suppress(OSError),
        contextlib.closing(tritonclient.http.InferenceServerClient(server.http)) as client,
    ):
        return bool(client.is_server_ready())
    return False


@contextlib.contextmanager
def _held_port() -> Iterator[int]:
    """A free port that stays ours: bound without listening, so that Triton may, with SO_REUSEPORT, and nobody else."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
