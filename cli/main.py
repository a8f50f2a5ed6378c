"""The ``tarflow`` command: its subcommands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Annotated

import typer
from typer import Option

from ..runtime.errors import TarflowError
from .bench import bench
from .bisect import bisect
from .build import build
from .calibrate import calibrate
from .check import check_engine
from .doctor import doctor
from .evaluate import evaluate
from .export import export
from .generate import generate
from .inspect import inspect
from .likelihood import denoise, likelihood
from .messages import spell
from .options import RayCommand
from .package import package
from .report import report
from .serve import serve
from .train import train
from .verify import verify

EXIT_INTERRUPTED = 130
_MAKING = (export, build, check_engine, generate, train)  # in the order of the help
_JUDGING = (verify, bisect, likelihood, denoise, evaluate, report, inspect)
_SERVING = (doctor, bench, calibrate, package, serve)
_EXTRAS = {"sklearn": "train", "ray": "ray"} | dict.fromkeys(
    ("fastapi", "uvicorn", "prometheus_client", "starlette"), "serve"
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="TarFlow normalizing flows from PyTorch checkpoints to production.\n\n"
    "Exit codes: 0 ok, 1 a check failed, 2 usage, 3 environment, 4 incompatible artifact.",
)
for _command in _MAKING + _JUDGING + _SERVING:
    app.command(cls=RayCommand)(_command)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"tarflow {version('tarflow')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. What is raised on purpose is a user's to mend: one message, no traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds: nothing half-written
    try:
        app()
        sys.stdout.flush()
    except (KeyboardInterrupt, SystemExit) as end:  # typer turns Ctrl-C in a command into 130, without a word
        code = EXIT_INTERRUPTED if isinstance(end, KeyboardInterrupt) else end.code
        if code == EXIT_INTERRUPTED:
            print("tarflow: interrupted; nothing half-written was left", file=sys.stderr)
        sys.exit(code)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except FileNotFoundError as error:
        _fail(f"no such file: '{error.filename}'" if error.filename else str(error), 2)
    except MemoryError:
        _fail("out of memory; use a smaller --n or --batch-size, or --memory least", 3)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "", "export")
        _fail(f"this command needs {error.name}, which is not installed; pip install 'tarflow[{extra}]'", 3)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (what is buffered cannot be written at exit either)
            _fail("the disk is full: the output could not be written", 3)
        _fail(f"'{error.filename}': {error.strerror}" if error.filename else str(error), 3)
    except TarflowError as error:
        _fail(spell(error), error.exit_code)


def _fail(message: str, code: int) -> None:
    print(f"tarflow: error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
