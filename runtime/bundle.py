"""The bundle: a folder of graphs, weights and a manifest. FORMAT.md is the normative text; this is its reader.

Nothing here needs an engine. Hashes are checked before anything in a bundle is handed to one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .claims import unsupported
from .errors import BundleError, Remedy, limit_of_machine
from .files import sha256
from .graph import check_graph
from .hidden import restore
from .hub import bundle_at
from .manifest import AGAIN, reader_of
from .manifest import FORMAT as FORMAT
from .manifest import FUSED as FUSED
from .manifest import GOLDEN as GOLDEN
from .manifest import KINDS as KINDS
from .manifest import MANIFEST as MANIFEST
from .manifest import MANIFEST_LIMIT as MANIFEST_LIMIT
from .manifest import RESIDENT as RESIDENT
from .manifest import SCHEMA as SCHEMA
from .manifest import WEIGHTS as WEIGHTS
from .manifest import BlockEntry as BlockEntry
from .manifest import FileEntry as FileEntry
from .manifest import Manifest as Manifest
from .manifest import ModelShape as ModelShape
from .manifest import read_manifest as read_manifest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PARITY = "PARITY.md"
_CHECKPOINTS = (".pth", ".pt", ".safetensors")  # by their suffixes
_BESIDE = ("README.md", "LICENSE")  # what hubs and git put there, and hidden files: nothing reads it


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle folder: its manifest, and paths to files known to be inside it, and to be its own still."""

    folder: Path
    manifest: Manifest
    hash: str  # SHA-256 of manifest.json, which names every other file's: the bundle's identity
    _seen: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)  # by file: inode, times

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Bundle:
        """Read the manifest and check that every file is inside the folder and of its size. Hashes: :meth:`check`.

        ``folder`` may be a place on the hub, ``hf:OWNER/REPO/FOLDER@REVISION``, which is fetched first; see ``hub``.
        Raises BundleError for anything that is not a whole bundle this version understands.
        """
        folder = bundle_at(folder)
        restore(folder)
        if folder.is_file():
            remedy = Remedy("export", {"checkpoint": folder}) if folder.suffix in _CHECKPOINTS else None
            what = "; of a checkpoint one is made" if remedy else ""
            raise BundleError(f"'{folder}' is a file; expected a bundle, a folder with {MANIFEST}{what}", remedy=remedy)
        if not folder.is_dir():
            raise BundleError(
                f"no bundle at '{folder}': expected a folder with {MANIFEST}; check the name, or export a checkpoint",
                field="bundle",
                found=str(folder),
                expected=f"a folder with {MANIFEST}",
                remedy=Remedy("export", {"folder": folder}),
            )
        path = folder / MANIFEST
        if not path.is_symlink() and not path.exists():
            raise BundleError(
                f"'{folder}' has no {MANIFEST}, so it is not a bundle; export one",
                field="bundle",
                found=str(folder),
                expected=f"a folder with {MANIFEST}",
                remedy=Remedy("export"),
            )
        _require_inside(folder, path)
        content = reader_of(str(path)).content(path, MANIFEST_LIMIT)
        bundle = cls(folder, read_manifest(content, str(path)), hashlib.sha256(content).hexdigest())
        for name, entry in bundle.manifest.files.items():
            found = bundle.path(name).stat()
            if found.st_size != entry.size:
                said = f"'{folder / name}' has {found.st_size} bytes; the manifest says {entry.size}"
                raise _damaged(folder, f"{said}: it is truncated or changed")
            bundle._seen[name] = _signature(found)
        return bundle

    def check_identity(self, hash: str) -> None:
        """Raise BundleError unless this is the bundle of that hash, which was here before."""
        if self.hash != hash:
            raise BundleError(
                f"'{self.folder}' is another bundle than it was: its hash is {self.hash[:16]}..., expected "
                f"{hash[:16]}...; put that one back, or open this one anew"
            )

    def path(self, name: str) -> Path:
        """The path of a file the manifest names, the one that was there when this was opened. Raises BundleError if it
        is missing, leads out of the folder, or is another by now.
        """
        path = self._place(name)
        if name in self._seen and self._seen[name] != _signature(path.stat()):
            self.check(name)
        return path

    def _place(self, name: str) -> Path:
        path = self.folder / name
        try:
            _require_inside(self.folder, path)
        except BundleError:
            self._require_its_manifest()
            raise
        return path

    def own(self, name: str) -> Path:
        """The folder ``plans`` or ``engines``, to be written to. Raises BundleError unless all that is in it is real:
        through a link, a stranger's bundle would have other files changed.
        """
        folder = self.folder / name
        for path in (folder, *folder.rglob("*")):
            if path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir()):
                raise BundleError(
                    f"'{path}' is a link or a device; expected files and folders, which can be written: remove it"
                )
        return folder

    def check(self, *names: str) -> None:
        """Compare SHA-256 of the named files with the manifest; by default of all, among which is no stranger. Raises
        BundleError.
        """
        if not names:
            self._check_beside()
        for name in names or tuple(self.manifest.files):
            with self._place(name).open("rb") as file:
                seen = _signature(os.fstat(file.fileno()))
                self._compare(name, hashlib.file_digest(file, "sha256").hexdigest())
            self._seen[name] = seen

    def confirm(self) -> None:
        """After something opened files by their paths: they are those that were hashed. Raises BundleError."""
        for name, seen in tuple(self._seen.items()):
            try:
                same = _signature((self.folder / name).stat()) == seen
            except OSError:
                same = False
            if not same and name not in (GOLDEN, PARITY):
                self.path(name)

    def _compare(self, name: str, found: str) -> None:
        said = self.manifest.files[name].sha256
        if found != said:
            self._require_its_manifest()
            differ = f"its SHA-256 is {found[:16]}..., the manifest says {said[:16]}..."
            raise _damaged(self.folder, f"'{self.folder / name}' is damaged or was changed: {differ}")

    def _require_its_manifest(self) -> None:
        """Raise BundleError if another bundle, or none, stands under this one's name by now."""
        try:
            found = sha256(self.folder / MANIFEST)
        except OSError:
            found = ""
        if self.hash not in ("", found):
            now = f"now {found[:16]}... is there" if found else "now none is there"
            raise BundleError(
                f"'{self.folder}' was replaced while it was open: {self.hash[:16]}... was opened, {now}; open it again"
            )

    def check_runnable(self) -> None:
        """Everything to know before an engine is given the graphs: hashes, no stranger among the files, nothing in a
        graph that an export would not write, and that the manifest's configuration is the one the weights carry. Raises
        BundleError.
        """
        from safetensors import safe_open

        self.check(*(name for name in self.manifest.files if name not in (GOLDEN, PARITY)))
        self._check_beside()
        with self._reading(WEIGHTS), safe_open(str(self.path(WEIGHTS)), framework="np") as file:
            said = json.loads((file.metadata() or {}).get("tarflow.config", "null"))
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if said != asdict(self.manifest.config):
            raise _damaged(self.folder, f"'{self.folder}': the manifest describes another model than its weights do")
        if wrong := unsupported(self.manifest.config, shapes):
            raise _damaged(self.folder, f"'{self.folder / WEIGHTS}' holds another model than it describes: {wrong}")
        self.check_graphs()

    def _check_beside(self) -> None:
        """Raise BundleError if the folder holds files that the manifest does not name: a graph could read its weights
        from there, unhashed.
        """
        named = {*self.manifest.files, MANIFEST, *_BESIDE}
        beside = (path for path in self.folder.iterdir() if not path.is_dir() and not path.name.startswith("."))
        strange = sorted(path.name for path in beside if path.name not in named)
        if strange:
            raise BundleError(
                f"'{self.folder}' holds files its manifest does not name: {', '.join(strange[:4])}; remove them, or "
                "copy the bundle again"
            )

    def check_graphs(self) -> None:
        """Look into every graph, for what :func:`check_graph` refuses. Their hashes are right already."""
        weights_size = self.manifest.files[WEIGHTS].size
        graphs = [entry for block in self.manifest.blocks for entry in block.graphs.items()]
        elsewhere = {name for kind, name in graphs if kind not in FUSED.values()}
        for name in sorted({name for _, name in graphs}):
            check_graph(self.path(name), weights_size, for_cuda=name not in elsewhere)

    def tensors(self, name: str) -> dict[str, NDArray[Any]]:
        """All tensors of a small safetensors file in the bundle, as numpy arrays. Checked first."""
        from safetensors.numpy import load

        content = self.path(name).read_bytes()  # what is hashed is what is parsed
        self._compare(name, hashlib.sha256(content).hexdigest())
        with self._reading(name):
            return load(content)

    def prior_variance(self) -> NDArray[np.float32]:
        """(T, D): the variance of each latent; ones but for volume-preserving models."""
        import numpy as np

        config = self.manifest.config
        shape = (config.tokens, config.patch_dim)
        if config.nvp:
            try:
                return np.ones(shape, np.float32)
            except (ValueError, MemoryError):
                raise _damaged(
                    self.folder,
                    f"'{self.folder / MANIFEST}' describes images of {config.image_size} pixels a side, more than this "
                    "machine can hold: it was edited, or made for another machine",
                ) from None
        from safetensors import safe_open

        missing = "holds no prior variance 'var'"
        with self._reading(WEIGHTS, missing), safe_open(str(self.path(WEIGHTS)), framework="np") as file:
            variance: NDArray[np.float32] = file.get_tensor("var")
        self.confirm()
        fits = variance.shape == shape and variance.dtype == np.float32
        if not fits or not (np.isfinite(variance) & (variance >= 0)).all():
            raise BundleError(
                f"'{self.folder / WEIGHTS}': the prior variance is {variance.dtype} {variance.shape}; "
                f"expected float32 {shape}, finite and not negative"
            )
        return variance

    @contextmanager
    def _reading(self, name: str, failed: str = "cannot be read") -> Iterator[None]:
        """Turn what is said of a file that holds no such tensors into one sentence."""
        from safetensors import SafetensorError

        try:
            yield
        except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
            damaged = _damaged(self.folder, f"'{self.folder / name}' {failed} ({error})")
            raise limit_of_machine(error, f"reading '{self.folder / name}'") or damaged from None


def _signature(found: os.stat_result) -> tuple[int, ...]:
    """What tells a file from another that takes its name."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _require_inside(folder: Path, path: Path) -> None:
    """Raise BundleError unless ``path`` is a regular file that lies, links followed, in ``folder``, or among the blobs
    of the hub's cache that ``folder`` is a snapshot in.
    """
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        missing = _damaged(folder, f"'{path}' is missing, though the manifest names it")
        raise limit_of_machine(error, f"opening '{path}'") or missing from None
    home = folder.resolve()
    blobs = [up.parent.parent / "blobs" for up in (home, *home.parents) if up.parent.name == "snapshots"]
    if not (resolved.is_relative_to(home) or resolved.parent in blobs) or not resolved.is_file():
        raise BundleError(f"'{path}' leads out of the bundle or is no regular file; a bundle's files lie inside it")


def _damaged(folder: Path, what: str) -> BundleError:
    remedy = Remedy("export", {"folder": folder, "force": True})
    return BundleError(f"{what}. {AGAIN[0].upper()}{AGAIN[1:]}", remedy=remedy)
