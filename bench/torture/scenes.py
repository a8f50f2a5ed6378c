"""What is killed: commands that write, what was there before them, and what may be there after a kill."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.torture.commands import bundle_of, line, run, save
from tarflow import checkpoint
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.plan import FOLDER, find_plan

Words = tuple[object, ...]
Files = Mapping[str, str]  # name -> SHA-256
TRAINING = ("--patch-size", 4, "--width", 64, "--blocks", 1, "--layers", 1, "--steps", 4, "--batch-size", 8)
SAVING = ("--save-every", 2, "--log-every", 1, "--sample-every", 2, "--samples", 4, "--threads", 1)


class Broken(Exception):
    """What stands is neither what was there before nor what the command makes."""


@dataclass(frozen=True)
class Stage:
    """A scene ready to be played: the files before it, and those after a run that nobody killed."""

    before: Path
    after: Path


@dataclass(frozen=True)
class Scene:
    """A command, and what may stand in its folder after it was killed.

    ``prepare`` fills a folder with what is there before. ``stands`` says "old" or "new", or raises Broken. ``again`` is
    the command to type after a kill, and ``finished`` raises Broken unless the folder is then as if nothing had been.
    """

    name: str
    prepare: Callable[[Path], None]
    command: Callable[[Path], Words]
    stands: Callable[[Path, Stage], str]
    again: Callable[[Path], Words]
    finished: Callable[[Path, Stage], None]


def digests(folder: Path, hidden: bool = True) -> dict[str, str]:
    """SHA-256 of all files of a folder; of a log the losses, of a plan, which holds times, that it is there."""
    return {
        path.relative_to(folder).as_posix(): _digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (hidden or not is_hidden(path.relative_to(folder)))
    }


def _digest(path: Path) -> str:
    if path.suffix == ".jsonl":
        return str([json.loads(text)["loss"] for text in path.read_text().splitlines()])
    if path.parent.name == FOLDER and path.suffix == ".json":
        return "a plan"
    if path.name == "state.pt":  # a state that was read and saved again holds the same in other bytes
        return hashlib.sha256(repr(_in_full(torch.load(path, weights_only=True))).encode()).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _in_full(state: object) -> object:
    """A state whose ``repr`` abbreviates nothing: tensors by their bytes."""
    if isinstance(state, torch.Tensor):
        content = state.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return state.dtype, tuple(state.shape), hashlib.sha256(content).hexdigest()
    if isinstance(state, Mapping):
        return {name: _in_full(part) for name, part in state.items()}
    return [_in_full(part) for part in state] if isinstance(state, (list, tuple)) else state


def is_hidden(path: Path) -> bool:
    """Whether a name is one of those that only a run in progress may hold."""
    return any(part.startswith(".") or part.endswith(".partial") for part in path.parts)


def hidden(folder: Path) -> Iterator[Path]:
    """What a run in progress would have there."""
    return (path for path in sorted(folder.rglob("*")) if is_hidden(path.relative_to(folder)))


def _one_of(place: Path, stage: Stage, name: str) -> str:
    """Whether a file or folder is the one from before, to the bit, or the new one."""
    found = _all(place / name)
    for word, folder in (("old", stage.before), ("new", stage.after)):
        if found == _all(folder / name):
            return word
    raise Broken(f"'{name}' is gone" if not found else f"'{name}' is neither the old nor the new one")


def _all(path: Path) -> Files:
    if path.is_dir():
        return digests(path)
    return {path.name: _digest(path)} if path.exists() else {}


def _as_if_nothing_had_been(place: Path, stage: Stage) -> None:
    found, expected = digests(place), digests(stage.after)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            what = "is left" if name not in expected else "is missing" if name not in found else "is another"
            raise Broken(f"after the second run, '{name}' {what}")


# --- export --force, over the bundle of another model ------------------------------------------------------------


def _exported(folder: Path) -> None:
    bundle_of(folder, 1)
    save(folder, 2)


def _export(folder: Path) -> Words:
    source = next(folder.glob("tiny2_*.pth"))
    return "export", source, "-o", folder / "bundle", "--force", "--no-verify", "--no-build"


# --- generate -o, over another picture ----------------------------------------------------------------------------


def _pictured(folder: Path) -> None:
    bundle_of(folder, 1)
    shutil.copyfile(Path(__file__).parent.parent / "growth.png", folder / "samples.png")


def _picture(folder: Path) -> Words:
    return "generate", folder / "bundle", "--n", 4, "--labels", "0-1", "-o", folder / "samples.png", "--threads", 1


# --- generate --out, shards --------------------------------------------------------------------------------------


def _bundled(folder: Path) -> None:
    bundle_of(folder, 1)


def _shards(folder: Path) -> Words:
    shards = ("--n", 48, "--shard-size", 16, "--out", folder / "shards", "--threads", 1)
    return "generate", folder / "bundle", "--labels", "0-1", *shards


def _whole_shards(place: Path, stage: Stage) -> str:
    """Each file that has its name is whole: the same as in the end; index.json is the last."""
    found, expected = digests(place / "shards", hidden=False), digests(stage.after / "shards")
    wrong = [name for name, digest in found.items() if expected.get(name) != digest]
    if wrong:
        raise Broken(f"'shards/{wrong[0]}' is not what it becomes")
    unlisted = [name for name in found if name.startswith("records/") and _shard_of(name) not in found]
    if unlisted or ("index.json" in found and found.keys() != expected.keys()):
        raise Broken("a record or the index speaks of shards that are not there")
    return "new" if found.keys() == expected.keys() else "old"


def _shard_of(record: str) -> str:
    return record.removeprefix("records/").replace(".json", ".npy")


# --- train ---------------------------------------------------------------------------------------------------------


def _train(folder: Path) -> Words:
    return "train", "--data", "digits", *TRAINING, *SAVING, "--noise-std", 0.15, "--out", folder / "run"


def _train_again(folder: Path) -> Words:
    return (*_train(folder), "--resume") if (folder / "run" / "state.pt").exists() else _train(folder)


def _whole_run(place: Path, stage: Stage) -> str:
    """Each file that has its name can be read to its end."""
    run = place / "run"
    for path in sorted(run.glob("*")):
        try:
            if path.name == "state.pt":
                torch.load(path, weights_only=True)
            elif path.suffix in (".pth", ".safetensors"):
                checkpoint.load(path)
        except Exception as error:
            raise Broken(f"'run/{path.name}' cannot be read: {error}") from None
    names = {path.name for path in run.glob("*")}
    return "new" if names >= {path.name for path in (stage.after / "run").glob("*")} else "old"


# --- calibrate, over another plan ---------------------------------------------------------------------------------


def _calibrate(folder: Path) -> Words:
    return "calibrate", folder / "bundle", "--batch", 1, "--samples", 1, "--threads", 1


def _planned(folder: Path) -> None:
    bundle_of(folder, 1)
    run(line(*_calibrate(folder)))


def _whole_plan(place: Path, stage: Stage) -> str:
    name = next((stage.before / "bundle" / FOLDER).glob("*.json")).relative_to(stage.before)
    if not (place / name).exists():
        raise Broken(f"'{name}' is gone")
    bundle = Bundle.open(place / "bundle")
    machine = json.loads((stage.before / name).read_bytes())["machine"]
    if find_plan(bundle, machine) is None:
        raise Broken(f"'{name}' is no plan of this bundle")
    return "old" if (place / name).read_bytes() == (stage.before / name).read_bytes() else "new"


SCENES = (
    Scene(
        "generate -o",
        _pictured,
        _picture,
        lambda place, stage: _one_of(place, stage, "samples.png"),
        _picture,
        _as_if_nothing_had_been,
    ),
    Scene(
        "generate --out",
        _bundled,
        _shards,
        _whole_shards,
        _shards,
        _as_if_nothing_had_been,
    ),
    Scene("calibrate", _planned, _calibrate, _whole_plan, _calibrate, _as_if_nothing_had_been),
    Scene("train", lambda folder: folder.mkdir(), _train, _whole_run, _train_again, _as_if_nothing_had_been),
    Scene(
        "export --force",
        _exported,
        _export,
        lambda place, stage: _one_of(place, stage, "bundle"),
        _export,
        _as_if_nothing_had_been,
    ),
)
