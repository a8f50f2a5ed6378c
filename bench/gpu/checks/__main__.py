"""Checks of the runtime on a device, the most important first.

    python -m bench.gpu.checks RESULTS.jsonl [BUNDLE ...] [--provider cuda|cpu] [--only CHECK ...]

Each is a process of its own, on a device with a time limit, and its outcome a line of JSON that is written at once: a
run that is cut short loses one of them. The exit code is 1 if anything does not hold.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu.checkout import DEMO
from bench.gpu.checks.check import Check
from bench.gpu.checks.one import CHECKS
from tarflow.runtime.bundle import Bundle

SAID = 700  # characters of what a check said before it failed


def outcome(check: Check, bundle: Bundle, provider: str) -> dict[str, Any]:
    """What a check found, or why it found nothing."""
    command = [sys.executable, "-m", "bench.gpu.checks.one", check.name, str(bundle.folder), provider]
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=check.limit if provider == "cuda" else None
        )
        if done.returncode:
            found = {"ok": False, "failed": f"exit code {done.returncode}", "said": done.stderr[-SAID:]}
        else:
            found = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        found = {"ok": False, "failed": f"not done after {check.limit} s"}
    head = {"check": check.name, "bundle": bundle.folder.name, "precision": bundle.manifest.precision}
    return {**head, "seconds": round(time.perf_counter() - began, 1), **found}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.checks", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="lines are added to it")
    parser.add_argument("bundles", type=Path, nargs="*", default=[DEMO], help="default: the demo")
    parser.add_argument(
        "--provider", choices=("cuda", "cpu"), default="cuda", help="cpu goes the same way without a GPU"
    )
    parser.add_argument("--only", nargs="+", choices=[check.name for check in CHECKS], metavar="CHECK")
    asked = parser.parse_args()
    bundles = [Bundle.open(folder) for folder in asked.bundles]
    on_cpu, held = asked.provider == "cpu", True
    for check in CHECKS:
        if (asked.only and check.name not in asked.only) or (on_cpu and not check.on_cpu):
            continue
        for bundle in bundles[:1] if check.once else bundles:
            precision = bundle.manifest.precision
            if precision not in check.precisions or (on_cpu and precision == "bf16"):  # which no CPU multiplies
                continue
            found = outcome(check, bundle, asked.provider)
            held &= found["ok"]
            print(json.dumps(found), flush=True)
            with asked.results.open("a") as file:
                file.write(json.dumps(found) + "\n")
    raise SystemExit(0 if held else 1)


if __name__ == "__main__":
    main()
