"""The real command, interrupted as a user would; the same however these tests were started."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

TARFLOW = [sys.executable, "-m", "tarflow.cli.main"]


def interrupted(args: list[object], cwd: Path, working: str, number: int) -> subprocess.CompletedProcess[str]:
    """Run the command until it says that it is ``working``, send it a signal, and wait for its end."""

    def heed() -> None:
        for ignored in (signal.SIGINT, signal.SIGHUP):  # by what a shell starts in the background, or nohup
            signal.signal(ignored, signal.SIG_DFL)

    process = subprocess.Popen(
        [*TARFLOW, *map(str, args)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed,
    )
    assert process.stderr is not None
    try:
        seen = ""
        while working not in seen:
            line = process.stderr.readline()
            assert line, f"ended before it was working: {seen}"
            seen += line
        process.send_signal(number)
        out, err = process.communicate()
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in err
    return subprocess.CompletedProcess(process.args, process.returncode, out, seen + err)
