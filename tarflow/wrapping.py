"""Weights as trainers wrap them: below keys, behind prefixes, raw ones beside their average."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor

from .runtime.errors import InputError

_CONTAINERS = (dict, list, tuple)
_DEEPEST = 8  # containers in each other; a hostile file has no end of them
_LAYERS = re.compile(  # what DistributedDataParallel, torch.compile, FSDP and checkpointing put into names
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_AVERAGED = {"ema", "swa", "shadow", "average", "averaged", "avg"}
_NO_WEIGHTS = {"optimizer", "optimizers", "optim", "opt", "exp"}  # an optimiser has averages of its own
_COUNTERS = {"n_averaged", "num_updates", "decay", "initted", "step"}  # kept by averages beside their weights

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Weights:
    """A state dict in a file, its names unwrapped; ``place`` is the keys and the prefix that it was found behind."""

    place: str
    averaged: bool
    state: dict[str, Tensor]

    def __str__(self) -> str:
        return f"{'averaged' if self.averaged else 'raw'} ones in '{self.place or 'no key'}'"


def weights_of(document: object, family: str, wanted: str | None, source: str) -> dict[str, Tensor] | None:
    """The state dict in what a file holds, whatever it is wrapped in; None if the file holds no tensors in containers.

    ``family`` is a pattern of the names looked for; without any, it is the largest state dict there is. ``wanted`` is
    "ema", "raw", or a place; None prefers an average, and logs what there was to choose from. Raises InputError if that
    leaves none or several, LookupError for a name that is there twice.
    """
    tables = list(_tables(document))
    found = [weights for path, table in tables for weights in _split(path, table, family)]
    if not found:
        return max((table for _, table in tables), key=len, default=None)
    averages = [weights for weights in found if weights.averaged]
    raw = [weights for weights in found if not weights.averaged]
    named = [weights for weights in found if weights.place == wanted]
    chosen = {None: averages or raw, "ema": averages, "raw": raw}.get(wanted, named)
    held = " and ".join(map(str, found))
    if len(chosen) != 1:
        kinds = ["ema"] * (len(averages) == 1) + ["raw"] * (len(raw) == 1)
        choices = kinds + [weights.place for weights in found if weights.place]
        found_word = "not given" if wanted is None else f"'{wanted}'"
        raise InputError.of("weights", found_word, " or ".join(choices), f"'{source}' holds {held}")
    if wanted is None and len(found) > 1:
        _log.warning("'%s' holds %s: took the %s; `weights` chooses others", source, held, chosen[0])
    elif wanted is None and not averages and (name := _nameless_average(tables)):
        _log.warning("'%s' holds averages such as '%s' not by weights' names: took the raw ones", source, name)
    return chosen[0].state


def _tables(document: object) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of each dictionary, and of each list by their numbers, with the keys that lead there."""
    waiting = [("", 0, document)] if isinstance(document, _CONTAINERS) else []
    seen = set[int]()
    for path, depth, here in waiting:  # grows meanwhile
        if id(here) in seen or depth > _DEEPEST:
            continue
        seen.add(id(here))
        inner = {str(key): value for key, value in (here.items() if isinstance(here, dict) else enumerate(here))}
        if table := {key: value for key, value in inner.items() if isinstance(value, Tensor)}:
            yield path, table
        waiting += [(f"{path}{key}.", depth + 1, v) for key, v in inner.items() if isinstance(v, _CONTAINERS)]


def _split(path: str, table: dict[str, Tensor], family: str) -> Iterator[Weights]:
    """The state dicts of one dictionary: names of the family by their prefixes, and whatever else has such a prefix."""
    ours = re.compile(rf"(?<![^.])(?:{family})$")
    names = [(_LAYERS.sub("", name), tensor) for name, tensor in table.items()]
    prefixes = {name[: match.start()] for name, _ in names if (match := ours.search(name)) and "." in match[0]}
    groups = {prefix: dict[str, Tensor]() for prefix in sorted(prefixes)}
    for name, tensor in names:
        prefix = _home(name, prefixes)
        if prefix is not None and groups[prefix].setdefault(name.removeprefix(prefix), tensor) is not tensor:
            raise LookupError(f"{path}{name} is there twice")
    for prefix, state in groups.items():
        place = f"{path}{prefix}".rstrip(".")
        counters = {name for name in _COUNTERS & state.keys() if state[name].numel() == 1}
        weights = {name: tensor for name, tensor in state.items() if name not in counters}
        if not _words(place) & _NO_WEIGHTS:
            yield Weights(place, "n_averaged" in counters or _is_average(place), weights)


def _home(name: str, prefixes: Collection[str]) -> str | None:
    """The longest prefix that a name has."""
    while name not in prefixes:
        if not name:
            return None
        name = name[: name.rstrip(".").rfind(".") + 1]
    return name


def _words(place: str) -> set[str]:
    return {word.lower() for word in _WORDS.findall(place)}


def _is_average(place: str) -> bool:
    words = _words(place)
    return bool(words & _AVERAGED) and "online" not in words and not words & _NO_WEIGHTS


def _nameless_average(tables: list[tuple[str, dict[str, Tensor]]]) -> str | None:
    """A tensor of an average that is kept in a list, or by names that are not the weights'."""
    names = (f"{path}{name}" for path, table in tables for name, tensor in table.items() if tensor.numel() > 1)
    return next((name for name in names if _is_average(name)), None)
