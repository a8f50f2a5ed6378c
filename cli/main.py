"""The ``tarflow`` command: its subcommands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated, NoReturn

import typer
from typer import Option

from ..runtime.errors import TarflowError
from ..runtime.signals import ending
from .bench import bench
from .bisect import bisect
from .build import build
from .calibrate import calibrate
from .check import check_engine
from .classify import classify
from .console import Notes, ready_streams, say
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

EXIT_INTERRUPTED, EXIT_FAULT = 130, 70
_MAKING = (export, build, check_engine, generate, train)  # in the order of the help
_JUDGING = (verify, bisect, likelihood, classify, denoise, evaluate, report, inspect)
_SERVING = (doctor, bench, calibrate, package, serve)
_EXTRAS = {  # what brings a package; others of ours come with export
    "sklearn": "train",
    "huggingface_hub": "hub",
    **dict.fromkeys(("grpc", "ray"), "ray"),
    **dict.fromkeys(("tensorrt", "cuda", "polygraphy"), "tensorrt"),
    **dict.fromkeys(("fastapi", "uvicorn", "prometheus_client", "starlette", "pydantic"), "serve"),
}
_BROUGHT_BY = {"grpc": "ray", "starlette": "fastapi", "pydantic": "fastapi"}  # what nobody installs by itself

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="TarFlow normalizing flows from PyTorch checkpoints to production.\n\n"
    "Exit codes: 0 ok, 1 a check failed, 2 usage, 3 environment, 4 incompatible artifact, 70 a fault of tarflow's.",
)
for _command in _MAKING + _JUDGING + _SERVING:
    _first_sentence = " ".join((_command.__doc__ or "").split("\n\n")[0].split()).split(". ")[0].rstrip(".") + "."
    app.command(cls=RayCommand, short_help=_first_sentence)(_command)


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
    """Run the command line. What is raised on purpose is a user's to mend: one message, no traceback. What is not is a
    fault of ours: a traceback, and where to report it.
    """
    ready_streams()
    logging.getLogger("tarflow").handlers = [Notes()]
    for number in ending():
        signal.signal(number, _terminate)
    try:
        app()
    except (KeyboardInterrupt, SystemExit) as end:  # typer turns Ctrl-C in a command into 130, without a word
        code = EXIT_INTERRUPTED if isinstance(end, KeyboardInterrupt) else end.code
        if code == EXIT_INTERRUPTED:
            say("tarflow: interrupted; nothing half-written was left")
        _leave(0 if isinstance(end.__context__, BrokenPipeError) else code)  # the reader of a pipe has seen enough
    except FileNotFoundError as error:
        _fail(f"no such file: '{error.filename}'" if error.filename else str(error), 2)
    except MemoryError:
        _fail("out of memory; use a smaller --n or --batch-size, or --memory least", 3)
    except ModuleNotFoundError as error:
        package, extra = _missing(error.name or "")
        _fail(f"this command needs {package}, which is not installed; pip install 'tarflow[{extra}]'", 3)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            _fail("the disk is full: the output could not be written", 3)
        _fail(f"'{error.filename}': {error.strerror}" if error.filename else str(error), 3)
    except TarflowError as error:
        _fail(spell(error), error.exit_code)
    except Exception:
        say(traceback.format_exc().rstrip())
        say(
            "tarflow: this is a fault of tarflow's, not yours: please report it where you have tarflow from, with the "
            "lines above, the command you typed and what tarflow doctor prints"
        )
        _leave(EXIT_FAULT)


def _missing(module: str) -> tuple[str, str]:
    """The package that has a module, and the extra that has all that the command needs which missed it."""
    top = module.partition(".")[0]
    package, extra = _BROUGHT_BY.get(top, top), _EXTRAS.get(top, "export")
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if command == "train":
        extra = "train"
    elif extra == "serve" and any(word.split("=")[0] == "--ray" for word in sys.argv):
        extra = "ray"  # which has serve's too
    return package, extra


def _terminate(number: int, frame: FrameType | None) -> None:
    """End as an exception does, so that nothing half-written is left; a second signal changes nothing meanwhile."""
    for each in ending():
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def _fail(message: str, code: int) -> NoReturn:
    say(f"tarflow: error: {message}")
    _leave(code)


def _leave(code: str | int | None) -> NoReturn:
    """Exit when all that was printed is where it belongs, or can get nowhere."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # it could not be written at exit either
        if not code and not isinstance(error, BrokenPipeError):
            _fail("the disk is full: the output could not be written", 3)
    sys.exit(code)


if __name__ == "__main__":
    main()
