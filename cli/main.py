"""The ``tarflow`` command: its subcommands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Annotated

import typer

from . import (
    bench,
    bisect,
    build,
    calibrate,
    check,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    likelihood,
    package,
    report,
    serve,
    train,
    verify,
)
from .messages import spell
from .options import RayCommand

EXIT_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="TarFlow normalizing flows from PyTorch checkpoints to production.\n\n"
    "Exit codes: 0 ok, 1 a check failed, 2 usage, 3 environment, 4 incompatible artifact.",
)
app.command()(export.export)
app.command()(build.build)
app.command()(check.check_engine)
app.command(cls=RayCommand)(generate.generate)
app.command()(train.train)
app.command()(verify.verify)
app.command()(bisect.bisect)
app.command()(likelihood.likelihood)
app.command()(likelihood.denoise)
app.command()(evaluate.evaluate)
app.command()(report.report)
app.command()(inspect.inspect)
app.command()(doctor.doctor)
app.command()(bench.bench)
app.command()(calibrate.calibrate)
app.command()(package.package)
app.command(cls=RayCommand)(serve.serve)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"tarflow {version('tarflow')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. Errors that carry an ``exit_code`` are a user's to mend: one message, no traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds: nothing half-written
    try:
        app()
        sys.stdout.flush()
    except KeyboardInterrupt:  # outside a command: typer ends those with 130, see below
        print("tarflow: interrupted; nothing half-written was left", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED:  # typer turns Ctrl-C into this, without a word
            print("tarflow: interrupted; nothing half-written was left", file=sys.stderr)
        raise
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except FileNotFoundError as error:
        _fail(f"no such file: '{error.filename}'" if error.filename else str(error), 2)
    except MemoryError:
        _fail("out of memory; use a smaller --n or --batch-size, or --memory least", 3)
    except ModuleNotFoundError as error:
        extra = {
            "sklearn": "train",
            "ray": "ray",
            "fastapi": "serve",
            "uvicorn": "serve",
            "prometheus_client": "serve",
            "starlette": "serve",
        }.get(error.name or "", "export")
        _fail(f"this command needs {error.name}, which is not installed; pip install 'tarflow[{extra}]'", 3)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (what is buffered cannot be written at exit either)
            _fail("the disk is full: the output could not be written", 3)
        _fail(f"'{error.filename}': {error.strerror}" if error.filename else str(error), 3)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if not isinstance(code, int):
            raise
        _fail(spell(error), code)


def _fail(message: str, code: int) -> None:
    print(f"tarflow: error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
