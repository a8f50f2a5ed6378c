"""The record of built engines: what a folder of them was built from, for which machine, and what was checked.

``BUNDLE/engines/<gpu>-<tensorrt>-<precision>/engines.json``; FORMAT.md is the normative text. An engine is native code:
its SHA-256 is compared with the record before anything deserialises it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .bundle import Bundle, ModelShape
from .errors import BundleError
from .files import replacing
from .resident import shapes

FORMAT = "tarflow-engines"
SCHEMA = 1
FOLDER = "engines"
RECORD = "engines.json"
ENGINE_KINDS = ("step", "forward", "gradient")
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

    def misfits(self, bundle: Bundle, here: Here) -> list[str]:
        """Why these engines cannot run here: what was found and what is here; empty if they can."""
        wrong = []
        if self.bundle != bundle.hash:
            wrong.append(f"they were built from another bundle ({self.bundle[:12]}, this one is {bundle.hash[:12]})")
        elif not self.complete(len(bundle.manifest.blocks)):
            wrong.append("the build was not finished")
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


def rebuild(bundle: Path, record: Record | None = None) -> str:
    """The command that builds engines for the machine it runs on."""
    command = f"build engines on this machine: tarflow build '{bundle}'"
    if record is not None and record.profiles.get("step"):
        batch = record.profiles["step"][0].batch
        command += f" --batch {','.join(map(str, batch))}"
    return command


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
    """Read ``engines.json``. Raises BundleError for one that is damaged or of another schema."""
    path = folder / RECORD
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(_LIMIT).decode())
        if document["format"] != FORMAT or document["schema"] != SCHEMA:
            raise ValueError(f"format {document['format']!r}, schema {document['schema']!r}")
        target = document["target"]
        return Record(
            bundle=_text(document["bundle"]),
            precision=_text(document["precision"]),
            package=_text(document["package"]),
            version=_text(document["version"]),
            version_compatible=bool(document["version_compatible"]),
            strip_weights=bool(document["strip_weights"]),
            target=Target(target["gpu"], tuple(map(_text, target["capabilities"]))),
            profiles={kind: tuple(map(_profile, document["profiles"][kind])) for kind in ENGINE_KINDS},
            engines={_file(name): Engine(**entry) for name, entry in document["engines"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"'{path}' is damaged or of another version ({type(error).__name__}: {str(error)[:100]}); remove "
            f"'{folder}' and {rebuild(folder.parent.parent)}"
        ) from None


def _profile(entry: Mapping[str, Any]) -> Profile:
    return Profile(int(entry["branches"]), _range(entry["batch"]), _range(entry["window"]))


def _range(numbers: Any) -> Range:
    least, best, most = (int(number) for number in numbers)
    if not 1 <= least <= best <= most:
        raise ValueError(f"{numbers} is no range")
    return least, best, most


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _file(name: str) -> str:
    """An engine's file name: it lies beside the record, nowhere else."""
    if "/" in name or "\\" in name or "\0" in name or not name.endswith(".engine"):
        raise ValueError(f"{name[:80]!r} is no engine's name")
    return name


def _newer(here: str, built: str) -> bool:
    """Whether a runtime may run version-compatible engines of ``built``: the same major version, not older."""
    ours, theirs = ([int(part) for part in version.split(".")[:3]] for version in (here, built))
    return ours[0] == theirs[0] and ours >= theirs
