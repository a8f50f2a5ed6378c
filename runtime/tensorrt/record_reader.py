"""Reading the record of built engines, every field of it checked: it decides which native code is loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..document import Reader, short
from ..errors import Remedy
from ..precision import ENGINE_PRECISIONS
from . import record
from .record import Engine, Profile, Range, Record, Target

_PRECISIONS = tuple(ENGINE_PRECISIONS.values())
_VERSION = re.compile(r"\d{1,6}\.\d{1,6}[0-9A-Za-z.+-]{0,48}")
_CAPABILITY = re.compile(r"\d{1,2}\.\d")
_MOST = 1 << 24  # of any size in a profile
_LIMIT = 16 << 20  # bytes of a record


def read_record(folder: Path) -> Record:
    """Read ``engines.json``, every field of it checked. Raises BundleError for one that is damaged or of another
    schema; unknown keys are left alone.
    """
    path = folder / record.RECORD
    advice = f"remove '{folder}' and build the engines again"
    reader = Reader(str(path), "record", advice, Remedy("build", {"bundle": folder.parent.parent}))
    top = reader.versioned(path, _LIMIT, record.FORMAT, record.SCHEMA)
    for name in record.GONE:
        if reader.get(top, name, bool):
            raise reader.wrong(f"'{name}' is true, which this version neither builds nor runs; expected false")
    if (level := top.get("level")) is not None:  # absent from records of before it was kept
        level = reader.natural(top, "level", 0, most=5)
    profiles = reader.get(top, "profiles", dict)
    return Record(
        bundle=reader.hash(reader.get(top, "bundle", str)),
        precision=reader.one_of(top, "precision", _PRECISIONS),
        # A module that will be imported: one of two, never another.
        package=reader.one_of(top, "package", record.PACKAGES),
        version=_version(reader, top),
        level=level,
        target=_target(reader, reader.get(top, "target", dict)),
        profiles={kind: _profiles(reader, profiles, kind) for kind in record.ENGINE_KINDS},
        engines=_engines(reader, reader.get(top, "engines", dict)),
    )


def _version(reader: Reader, top: Mapping[str, Any]) -> str:
    version = reader.get(top, "version", str)
    if not _VERSION.fullmatch(version):
        raise reader.wrong(f"'version' is {short(version)}; expected one such as '11.4.0.106'")
    return version


def _target(reader: Reader, target: dict[str, Any]) -> Target:
    gpu = target.get("gpu")
    capabilities = reader.get(target, "capabilities", list)
    if gpu is not None and not (isinstance(gpu, str) and gpu):
        raise reader.wrong(f"'target.gpu' is {short(gpu)}; expected null or the name of a GPU")
    if not capabilities or not all(isinstance(one, str) and _CAPABILITY.fullmatch(one) for one in capabilities):
        raise reader.wrong(f"'target.capabilities' is {short(capabilities)}; expected a list such as ['8.6', '8.9']")
    return Target(gpu, tuple(capabilities))


def _profiles(reader: Reader, profiles: Mapping[str, Any], kind: str) -> tuple[Profile, ...]:
    entries = reader.get(profiles, kind, list)
    if not entries:
        raise reader.wrong(f"'profiles.{kind}' is empty; an engine is built for one profile at least")
    return tuple(_profile(reader, reader.typed(one, dict, f"profiles.{kind}[{k}]")) for k, one in enumerate(entries))


def _profile(reader: Reader, entry: dict[str, Any]) -> Profile:
    branches = reader.natural(entry, "branches", 1, most=2)
    return Profile(branches, _range(reader, entry, "batch"), _range(reader, entry, "window"))


def _range(reader: Reader, entry: dict[str, Any], key: str) -> Range:
    sizes = reader.get(entry, key, list)
    whole = len(sizes) == 3 and all(type(size) is int for size in sizes)
    if not whole or not 1 <= sizes[0] <= sizes[1] <= sizes[2] <= _MOST:
        raise reader.wrong(f"'{key}' is {short(sizes)}; expected three integers, 1 <= least <= best <= most <= {_MOST}")
    return sizes[0], sizes[1], sizes[2]


def _engines(reader: Reader, entries: dict[str, Any]) -> dict[str, Engine]:
    engines = {
        _file(reader, name): _engine(reader, name, reader.typed(entry, dict, f"engines.{short(name)}"))
        for name, entry in entries.items()
    }
    places = Counter((engine.block, engine.kind) for engine in engines.values())
    for (block, kind), count in places.items():
        if count > 1:
            raise reader.wrong(f"{count} engines are block {block}'s {kind} engine; expected one")
    return engines


def _engine(reader: Reader, name: str, entry: dict[str, Any]) -> Engine:
    parity = entry.get("parity")
    if parity is not None:
        reader.number(reader.typed(parity, dict, f"'parity' of {short(name)}"), "rms", 0)
    return Engine(
        block=reader.natural(entry, "block", 0),
        kind=reader.one_of(entry, "kind", record.ENGINE_KINDS),
        graph=reader.confined(reader.get(entry, "graph", str)),
        key=reader.hash(reader.get(entry, "key", str)),
        sha256=reader.hash(reader.get(entry, "sha256", str)),
        size=reader.natural(entry, "size", 0),
        seconds=reader.number(entry, "seconds", 0),
        asked=reader.one_of(entry, "asked", _PRECISIONS),
        built=reader.get(entry, "built", str),
        attested=reader.one_of(entry, "attested", ("engine", "network")),
        parity=parity,
    )


def _file(reader: Reader, name: str) -> str:
    """An engine's file name: it lies beside the record, nowhere else."""
    if "/" in name or not name.endswith(".engine"):
        raise reader.wrong(f"{short(name)} is no engine's name")
    return reader.confined(name)
