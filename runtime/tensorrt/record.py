"""The record of built engines: what a folder of them was built from, for which machine, and what was checked.

``BUNDLE/engines/<gpu>-<tensorrt>-<precision>/engines.json``; FORMAT.md is the normative text. An engine is native code:
its SHA-256 is compared with the record before anything deserialises it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..bundle import Bundle, ModelShape
from ..document import Reader, short
from ..errors import BundleError
from ..files import replacing
from ..resident import shapes

FORMAT = "tarflow-engines"
SCHEMA = 1
FOLDER = "engines"
RECORD = "engines.json"
ENGINE_KINDS = ("step", "forward", "gradient")
PRECISIONS = ("fp32", "fp16", "bf16")
PACKAGES = ("tensorrt", "tensorrt_rtx")  # modules that build and run engines
_VERSION = re.compile(r"\d{1,6}\.\d{1,6}[0-9A-Za-z.+-]{0,48}")
_CAPABILITY = re.compile(r"\d{1,2}\.\d")
_MOST = 1 << 24  # of any size in a profile
_LIMIT = 16 << 20  # bytes of a record

Range = tuple[int, int, int]  # least, best, most


@dataclass(frozen=True, slots=True)
class Profile:
    """Sizes an engine is built for, each (least, best, most); ``branches`` is 1, or 2 under guidance."""

    branches: int
    batch: Range
    window: Range = (1, 1, 1)

    def holds(self, branches: int, window: int) -> bool:
        return self.branches == branches and self.window[0] <= window <= self.window[2]


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine file: of which graph, its hash, and what was found out about it.

    ``built`` is the precision read back, ``attested`` where it was read from: "engine" or "network".
    ``parity`` is what this very file computed, against ONNX Runtime; None if it has not run.
    """

    block: int
    kind: str
    graph: str
    key: str
    sha256: str
    size: int
    seconds: float
    asked: str
    built: str
    attested: str
    parity: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where engines run: a GPU's name, None for any with one of these compute capabilities, such as "8.6"."""

    gpu: str | None
    capabilities: tuple[str, ...]

    def for_machine(self, here: Here | None) -> tuple[str, ...]:
        """Capabilities to build for so that the engines run here too; TensorRT builds for the GPU at hand alone."""
        if here is None or here.capability in self.capabilities:
            return self.capabilities
        return (*self.capabilities, here.capability) if here.package == "tensorrt_rtx" else (here.capability,)

    def __str__(self) -> str:
        return f"{self.gpu or 'any GPU'} (compute capability {', '.join(self.capabilities)})"


@dataclass(frozen=True, slots=True)
class Here:
    """What a machine has: TensorRT's package and version, the GPU's name and compute capability."""

    package: str
    version: str
    gpu: str
    capability: str


@dataclass(frozen=True, slots=True)
class Record:
    """All engines of one build. Immutable; :func:`read_record` and :meth:`write` are inverses."""

    bundle: str  # SHA-256 of the bundle's manifest
    precision: str
    package: str
    version: str
    version_compatible: bool
    strip_weights: bool
    target: Target
    profiles: Mapping[str, tuple[Profile, ...]]
    engines: Mapping[str, Engine] = field(default_factory=dict)
    level: int | None = None

    def write(self, folder: Path) -> None:
        """Write ``engines.json``, whole or not at all."""
        with replacing(folder / RECORD) as file:
            document = {"format": FORMAT, "schema": SCHEMA, **asdict(self)}
            file.write((json.dumps(document, indent=1, allow_nan=False) + "\n").encode())

    @property
    def largest_batch(self) -> int:
        """Images one decoding can take, guided or not."""
        return min(profile.batch[2] for profile in self.profiles["step"])

    def complete(self, blocks: int) -> bool:
        made = {(engine.block, engine.kind) for engine in self.engines.values()}
        return made >= {(block, kind) for block in range(blocks) for kind in ENGINE_KINDS}

    def _knows_graphs(self, bundle: Bundle) -> bool:
        """Whether every engine's block and graph are the bundle's: its weights may be read through them."""
        blocks = bundle.manifest.blocks
        engines = self.engines.values()
        return all(e.block < len(blocks) and e.graph in blocks[e.block].graphs.values() for e in engines)

    def misfits(self, bundle: Bundle, here: Here) -> list[str]:
        """Why these engines cannot run here: what was found and what is here; empty if they can."""
        wrong = []
        if self.bundle != bundle.hash:
            wrong.append(f"they were built from another bundle ({self.bundle[:12]}, this one is {bundle.hash[:12]})")
        elif not self.complete(len(bundle.manifest.blocks)):
            wrong.append("the build was not finished")
        elif not self._knows_graphs(bundle):
            wrong.append("they name graphs that this bundle does not have")
        if self.package != here.package:
            wrong.append(f"they need {self.package} {self.version}, here is {here.package} {here.version}")
        elif self.version != here.version and not (self.version_compatible and _newer(here.version, self.version)):
            wrong.append(f"they need {self.package} {self.version} exactly, here is {here.version}")
        if here.capability not in self.target.capabilities:
            wrong.append(f"they are for {self.target}, here is {here.gpu} ({here.capability})")
        elif self.target.gpu not in (None, here.gpu):
            wrong.append(f"they are tuned for {self.target.gpu}, here is {here.gpu}")
        return wrong

    def read(self, folder: Path, name: str) -> bytes:
        """The content of an engine, its hash checked. Raises BundleError for one that is missing or was changed."""
        path, engine = folder / name, self.engines[name]
        if path.is_symlink() or not path.is_file():
            raise BundleError(f"'{path}' is missing or no regular file; {rebuild(folder.parent.parent, self)}")
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()  # of the bytes that will be loaded, not of a second reading
        if found != engine.sha256:
            raise BundleError(
                f"'{path}' was changed after it was built: its SHA-256 is {found[:16]}..., the record says "
                f"{engine.sha256[:16]}... It was not loaded; {rebuild(folder.parent.parent, self)}"
            )
        return content


def rebuild(
    bundle: Path,
    record: Record | None = None,
    here: Here | None = None,
    batch: Range | None = None,
    window: Range | None = None,
) -> str:
    """The command that builds engines like those of ``record`` for the machine it runs on, which ``here`` describes.

    ``batch`` and ``window`` are what they should have been built with, if that is what is wrong.
    """
    command = f"build engines on this machine: tarflow build '{bundle}'"
    if record is None:
        return command
    steps = record.profiles["step"]
    batch, window = batch or steps[0].batch, window or steps[-1].window
    command += f" --engine {record.precision} --batch {_comma(batch)}"
    if window[2] > 1:
        command += f" --window {_comma(window)}"
    if record.target.gpu is None:
        command += f" --device {_comma(record.target.for_machine(here))}"
    if record.version_compatible:
        command += " --version-compatible"
    elif record.strip_weights:  # not both: the lean runtime cannot fill in weights
        command += " --strip-weights"
    return command + (f" --level {record.level}" if record.level is not None else "")


def _comma(parts: Sequence[object]) -> str:
    return ",".join(map(str, parts))


def tensor_shapes(config: ModelShape, kind: str, batch: int, branches: int, window: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs of an engine."""
    sequence = (batch, config.tokens, config.patch_dim)
    if kind == "step":
        return shapes(config, batch, branches, window)
    if kind == "gradient":
        return {"x": sequence, "labels": (1, batch), "grad_z": sequence, "grad_log_det": (batch,)}
    return {
        "x": sequence,
        "labels": (branches, batch),
        "mix": (2, branches, config.tokens),
        "inverse_temperature": (branches,),
    }


def folders(bundle: Bundle) -> list[Path]:
    """Folders that hold a record, in the order of their names."""
    return sorted(path.parent for path in (bundle.folder / FOLDER).glob(f"*/{RECORD}"))


def read_record(folder: Path) -> Record:
    """Read ``engines.json``, every field of it checked. Raises BundleError for one that is damaged or of another
    schema; unknown keys are left alone.
    """
    path = folder / RECORD
    reader = Reader(str(path), "record", f"remove '{folder}' and {rebuild(folder.parent.parent)}")
    try:
        with path.open("rb") as file:
            content = file.read(_LIMIT + 1)
    except OSError as error:
        raise BundleError(f"'{path}' cannot be read: {error.strerror}; {reader.advice}") from None
    if len(content) > _LIMIT:
        raise reader.wrong(f"it is larger than {_LIMIT >> 20} MiB; a record is not")
    top = reader.parse(content)
    reader.one_of(top, "format", (FORMAT,))
    if reader.natural(top, "schema", 1) != SCHEMA:
        raise reader.wrong(f"'schema' is {short(top['schema'])}; this tarflow reads {SCHEMA}")
    level = top.get("level")  # absent from records of before it was kept
    if level is not None and not (type(level) is int and 0 <= level <= 5):
        raise reader.wrong(f"'level' is {short(level)}; expected null or an integer from 0 to 5")
    profiles = reader.get(top, "profiles", dict)
    return Record(
        bundle=reader.hash(reader.get(top, "bundle", str)),
        precision=reader.one_of(top, "precision", PRECISIONS),
        package=reader.one_of(top, "package", PACKAGES),  # a module that will be imported: one of two, never another
        version=_version(reader, top),
        version_compatible=reader.get(top, "version_compatible", bool),
        strip_weights=reader.get(top, "strip_weights", bool),
        level=level,
        target=_target(reader, reader.get(top, "target", dict)),
        profiles={kind: _profiles(reader, profiles, kind) for kind in ENGINE_KINDS},
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
    return tuple(
        _profile(reader, reader.typed(entry, dict, f"profiles.{kind}[{k}]")) for k, entry in enumerate(entries)
    )


def _profile(reader: Reader, entry: dict[str, Any]) -> Profile:
    branches = reader.natural(entry, "branches", 1)
    if branches > 2:
        raise reader.wrong(f"'branches' is {branches}; expected 1, or 2 under guidance")
    return Profile(branches, _range(reader, entry, "batch"), _range(reader, entry, "window"))


def _range(reader: Reader, entry: dict[str, Any], key: str) -> Range:
    numbers = reader.get(entry, key, list)
    whole = len(numbers) == 3 and all(type(number) is int for number in numbers)
    if not whole or not 1 <= numbers[0] <= numbers[1] <= numbers[2] <= _MOST:
        raise reader.wrong(
            f"'{key}' is {short(numbers)}; expected three integers, 1 <= least <= best <= most <= {_MOST}"
        )
    return numbers[0], numbers[1], numbers[2]


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
    seconds = entry.get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < _MOST:
        raise reader.wrong(f"'seconds' of {short(name)} is {short(seconds)}; expected a number of 0 or more")
    parity = entry.get("parity")
    if parity is not None:
        reader.typed(parity, dict, f"'parity' of {short(name)}")
    return Engine(
        block=reader.natural(entry, "block", 0),
        kind=reader.one_of(entry, "kind", ENGINE_KINDS),
        graph=reader.confined(reader.get(entry, "graph", str)),
        key=reader.hash(reader.get(entry, "key", str)),
        sha256=reader.hash(reader.get(entry, "sha256", str)),
        size=reader.natural(entry, "size", 0),
        seconds=float(seconds),
        asked=reader.one_of(entry, "asked", PRECISIONS),
        built=reader.get(entry, "built", str),
        attested=reader.one_of(entry, "attested", ("engine", "network")),
        parity=parity,
    )


def _file(reader: Reader, name: str) -> str:
    """An engine's file name: it lies beside the record, nowhere else."""
    if "/" in name or not name.endswith(".engine"):
        raise reader.wrong(f"{short(name)} is no engine's name")
    return reader.confined(name)


def _newer(here: str, built: str) -> bool:
    """Whether a runtime may run version-compatible engines of ``built``: the same major version, not older."""
    ours, theirs = ([int(part) for part in re.findall(r"\d+", version)[:3]] for version in (here, built))
    return ours[0] == theirs[0] and ours >= theirs
