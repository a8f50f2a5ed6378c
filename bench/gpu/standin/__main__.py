"""Probes, or any command, on a pretended GPU.

    python -m bench.gpu.standin [PROBE ...] [--bundle DIR]
    python -m bench.gpu.standin --log FILE -- python -m bench.gpu.checks ...

A probe's findings are a line of JSON. Whatever else is run takes its onnxruntime from here; what it does on the device
is written to the log.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.gpu.checkout import DEMO
from bench.gpu.standin.build import Standin, build

NAMES = ("tf32", "audit", "weights", "growth", "alternate", "crowd", "threads", "device", "cpp")
LINGER = "2000"  # microseconds of a capture, in the probe of threads: long enough for others' calls to fall into it


def find(standin: Standin, name: str, bundle: Path, *more: str) -> dict[str, Any]:
    """What one probe finds, in a process of its own that sees two GPUs. Raises CalledProcessError if it fails."""
    code = "import json, sys; from bench.gpu.standin.probes import probe; print(json.dumps(probe(*sys.argv[1:])))"
    with tempfile.TemporaryDirectory() as place:
        environment = standin.environment(Path(place) / "log") | {"STANDIN_DEVICES": "2"}
        if name == "threads":
            environment["STANDIN_LINGER"] = LINGER
        command = [sys.executable, "-c", code, name, str(bundle), *more]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.standin", description=__doc__.splitlines()[0])
    parser.add_argument("probes", nargs="*", metavar="PROBE", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--bundle", type=Path, default=DEMO, metavar="DIR", help="default: the demo")
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="of a command: what it does on the device; appended to"
    )
    arguments = sys.argv[1:]
    command = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    asked = parser.parse_args(arguments[: arguments.index("--")] if command else arguments)
    standin = build()
    if command:
        os.execvpe(command[0], command, standin.environment(asked.log))
    unknown = sorted(set(asked.probes) - set(NAMES))
    if unknown:
        parser.error(f"no probe {', '.join(unknown)}; expected some of {', '.join(NAMES)}")
    for name in asked.probes or NAMES:
        print(json.dumps(find(standin, name, asked.bundle)), flush=True)


if __name__ == "__main__":
    main()
