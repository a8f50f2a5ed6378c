"""Options that several commands share, so that one word means one thing.

A group of them is one parameter of a command: ``opening: Opening`` under :func:`opens` is every flag about how a bundle
is opened, ``drawing: Drawing`` under :func:`draws` every flag about what is drawn. A new option is a line here.
The bundle of a command (``BundleArgument``) comes opened: what is none is refused before anything else.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from typer import Argument, BadParameter, Option
from typer.core import TyperCommand

from ..config import Hints
from ..runtime.bundle import Bundle, ModelShape
from ..runtime.errors import InputError, TarflowError
from ..runtime.opening import Opening, parse_memory
from .console import default_bundle, label_choices, parse_labels

if TYPE_CHECKING:
    from ..runtime.request import Resolved

Command = TypeVar("Command", bound=Callable[..., None])
Flags = Mapping[str, Parameter]


def _flag(kind: Any, default: Any, help: str, *names: str, metavar: str | None = None) -> Parameter:
    annotation = Annotated[kind, Option(*names, help=help, metavar=metavar)]
    return Parameter("named_by_its_key", Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


class _Refused(TarflowError):
    exit_code = InputError.exit_code


def _open(place: str) -> Bundle:
    try:
        return Bundle.open(place)
    except InputError as error:  # a ValueError, of which click says nothing but that there was one
        raise _Refused(str(error)) from None


BundleArgument = Annotated[
    Bundle,
    Argument(
        parser=_open,
        default_factory=default_bundle,
        show_default=False,
        help="A bundle folder, or hf:OWNER/REPO/FOLDER@REVISION. Default: ./tarflow-bundle if there, else the demo.",
    ),
]
BundlePath = Annotated[Path, Argument(help="A bundle folder, or hf:OWNER/REPO/FOLDER@REVISION.")]
Json = Annotated[bool, Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, Option("-q", "--quiet", help="Do not say on stderr how far it is.")]
Labels = Annotated[
    str | None,
    Option(help="A class (3), a range dealt out in turn (0-9), a list (1,4,7) or y.npy. Default: the null class."),
]
Ray = Annotated[
    str | None,
    Option(
        metavar="[ADDRESS]",
        help="Use Ray: a cluster (auto, HOST:PORT or ray://HOST:PORT), or alone the one of RAY_ADDRESS, else one here.",
    ),
]
_UNLIKE = "Input should be "
_ADDRESS = re.compile(r"auto|local|(ray://)?[^\s/:]+:\d+|(ray://)?\[[0-9a-fA-F:]+\]:\d+")

OPENING: Flags = {
    "provider": _flag(
        str,
        "auto",
        "auto (the first that works here of tensorrt, cuda, native, cpu), or one of them: engines of tarflow build, "
        "ONNX Runtime on a GPU, cuda:1 for another, the native engine, ONNX Runtime on CPUs.",
    ),
    "threads": _flag(int | None, None, "Threads of one operator. Default: one a core."),
    "spinning": _flag(bool | None, None, "Let idle threads spin; not where cores are shared."),
    "memory": _flag(
        str | None,
        None,
        "Memory that a process stays below, such as 8GiB: sets batches, and opens one block at a time where all do not "
        "fit, by estimates that are rather too high. least: always one block at a time.",
        metavar="SIZE|least",
    ),
    "cuda_graph": _flag(bool, True, "Replay a step on a GPU as one CUDA graph."),
    "precision": _flag(
        str | None,
        None,
        "What the native engine keeps weights in: fp32, int16, bf16, int8. Default: int8 of an int8 bundle, else fp32.",
    ),
}
Threads = OPENING["threads"].annotation
GUIDANCE: Flags = {
    "guidance": _flag(float, 0.0, "Guidance scale; 0 is none."),
    "guide": _flag(str, "ab", "What is guided: ab, a (scale) or b (shift)."),
    "annealed": _flag(bool, False, "Let guidance grow along the sequence.", "--annealed/--constant"),
    "attention_temperature": _flag(float, 1.0, "Divides the unconditional branch's logits."),
}
DECODING: Flags = {
    "decode": _flag(
        str | None,
        None,
        "serial, or in parallel until patches change by no more than 1e-5 (exact) or 1e-3 (fast): when it stops, not "
        "how far samples are off, which may be a few times that. Default: exact where calibrate found it faster.",
    ),
    "tolerance": _flag(float | None, None, "Decode in parallel until patches change by no more than this."),
}
DRAWING: Flags = {
    **GUIDANCE,
    "denoise": _flag(bool | None, None, "Denoise. Default: if trained with Gaussian noise."),
    "denoise_strength": _flag(float, 1.0, "Factor on the noise variance when denoising."),
    "seed": _flag(int, 0, "Seed of the noise."),
    "first_sample": _flag(int, 0, "Index of the first sample; seed and index fix a sample."),
    "certify": _flag(bool, True, "Encode the samples again and report the error."),
    "redraw_nonfinite": _flag(bool, False, "Draw samples that overflow again.", "--redraw-nonfinite"),
    "batch_size": _flag(int | None, None, "Samples at a time. Default: up to 64, by memory."),
    "reproducible": _flag(bool, False, "Bitwise the same whatever n, batch size, threads.", "--reproducible"),
    **DECODING,
}


HINTS: Flags = {
    "patch_size": _flag(int | None, None, "Patch size, if the checkpoint's name does not say it."),
    "noise_std": _flag(str | None, None, "Training noise, if the name does not say it: a number, or 'uniform'."),
    "weights": _flag(
        str | None,
        None,
        "Of a checkpoint that has several weights: ema (averaged), raw, or a key. Default: averaged ones, if any.",
        metavar="ema|raw|KEY",
    ),
}


@dataclass(frozen=True, slots=True)
class Drawing:
    """What was said on the command line about drawing, by flag."""

    said: Mapping[str, Any]

    def request(self, config: ModelShape, n: int, labels: str | None, every_class: bool = False) -> Resolved:
        """The request for a model; ``labels`` are dealt out in turn, by default none or with ``every_class`` all.

        Raises InputError for what this model cannot.
        """
        from ..runtime.guidance import Guidance
        from ..runtime.request import Request

        fields = dict(self.said)
        guidance = Guidance(*(fields.pop(name) for name in GUIDANCE))
        denoise, strength = fields.get("denoise"), fields.pop("denoise_strength", 1.0)
        fields["denoise"] = strength if denoise or (denoise is None and config.noise_std) else False
        if labels is None and every_class and config.classes:
            labels = f"0-{config.classes - 1}"
        turn = n if labels is None or labels.endswith(".npy") else len(label_choices(labels))
        dealt = parse_labels(labels, fields.get("first_sample", 0), turn)
        classes = None if dealt is None else tuple(dealt.tolist())
        return Request(n=n, labels=classes, guidance=guidance, **fields).resolved(config)


def _spread(parameter: str, make: Callable[..., Any], flags: Flags) -> Callable[[Command], Command]:
    """Put flags in the place of a command's parameter, which is then made of what was said with them."""

    def decorate(command: Command) -> Command:
        own = signature(command, eval_str=True)
        mine = [flag.replace(name=name) for name, flag in flags.items()]
        parameters = []
        for found in own.parameters.values():
            parameters += mine if found.name == parameter else [found.replace(kind=Parameter.KEYWORD_ONLY)]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            said = {name: given.pop(name) for name in flags}
            command(**given, **{parameter: make(**said)})

        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {found.name: found.annotation for found in parameters}
        return run  # type: ignore[return-value]

    return decorate


def _opening(memory: str | None, **said: Any) -> Opening:
    return Opening(memory=parse_memory(memory), **said)


opens = _spread("opening", _opening, OPENING)  # a command whose parameter ``opening`` is an Opening
hinted = _spread("hints", Hints, HINTS)  # a command whose parameter ``hints`` are Hints about a checkpoint


def draws(*names: str) -> Callable[[Command], Command]:
    """A command whose parameter ``drawing`` is a :class:`Drawing`, of some flags or of all."""
    flags = {name: flag for name, flag in DRAWING.items() if name in names or not names}
    return _spread("drawing", lambda **said: Drawing(said), flags)


class RayCommand(TyperCommand):
    """A command whose ``--ray`` may stand alone: it takes the next word only if that is an address.

    ``--ray`` alone means ``--ray=``, the empty address. (Typer's options have a value always or never.)
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = list(args)
        for i, word in enumerate(words):
            if word == "--":
                break
            if word == "--ray" and not _ADDRESS.fullmatch("".join(words[i + 1 : i + 2])):
                words[i] = "--ray="
        given = list(words)
        try:
            return super().parse_args(ctx, words)
        except BadParameter as error:  # in words that name a type, and not what was found
            found = self.make_parser(ctx).parse_args(given)[0].get(error.param.name) if error.param else None
            if isinstance(found, str) and error.message.startswith(_UNLIKE):
                expected = error.message.removeprefix(_UNLIKE).split(", unable")[0]
                error.message = f"it is '{found}'; expected {expected}"
            raise
