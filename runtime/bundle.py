"""The bundle: a folder of graphs, weights and a manifest. FORMAT.md is the normative text; this is its reader.

Nothing here needs an engine. Hashes are checked before anything in a bundle is handed to one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .claims import unsupported
from .errors import BundleError, Remedy
from .files import sha256
from .manifest import AGAIN, reader_of
from .manifest import FORMAT as FORMAT
from .manifest import GOLDEN as GOLDEN
from .manifest import KINDS as KINDS
from .manifest import MANIFEST as MANIFEST
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
MANIFEST_LIMIT = 16 << 20  # bytes; a manifest of kilobytes is normal


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle folder: its manifest, and paths to files known to be inside it."""

    folder: Path
    manifest: Manifest
    hash: str  # SHA-256 of manifest.json, which names every other file's: the bundle's identity

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Bundle:
        """Read the manifest and check that every file is inside the folder and of its size. Hashes: :meth:`check`.

        Raises BundleError for anything that is not a whole bundle this version understands.
        """
        import hashlib

        folder = Path(folder)
        if not folder.is_dir():
            raise BundleError(
                f"no bundle at '{folder}': expected a folder with {MANIFEST}; export one",
                remedy=Remedy("export", {"folder": folder}),
            )
        path = folder / MANIFEST
        if not path.is_symlink() and not path.exists():
            raise BundleError(
                f"'{folder}' has no {MANIFEST}, so it is not a bundle; export one", remedy=Remedy("export")
            )
        _require_inside(folder, path)
        content = reader_of(str(path)).content(path, MANIFEST_LIMIT)
        bundle = cls(folder, read_manifest(content, str(path)), hashlib.sha256(content).hexdigest())
        for name, entry in bundle.manifest.files.items():
            size = bundle.path(name).stat().st_size
            if size != entry.size:
                said = f"'{folder / name}' has {size} bytes; the manifest says {entry.size}"
                raise _damaged(folder, f"{said}: it is truncated or changed")
        return bundle

    def path(self, name: str) -> Path:
        """The path of a file the manifest names. Raises BundleError if it is missing or leads out of the folder."""
        path = self.folder / name
        _require_inside(self.folder, path)
        return path

    def check(self, *names: str) -> None:
        """Compare SHA-256 of the named files (all of them by default) with the manifest. Raises BundleError."""
        for name in names or tuple(self.manifest.files):
            found, said = sha256(self.path(name)), self.manifest.files[name].sha256
            if found != said:
                differ = f"its SHA-256 is {found[:16]}..., the manifest says {said[:16]}..."
                raise _damaged(self.folder, f"'{self.folder / name}' is damaged or was changed: {differ}")

    def check_runnable(self) -> None:
        """Everything to know before an engine is given the graphs: hashes, no stranger among the files, and that the
        manifest's configuration is the one the weights carry. Raises BundleError.
        """
        from safetensors import safe_open

        self.check(*(name for name in self.manifest.files if name not in (GOLDEN, PARITY)))
        named = {*self.manifest.files, MANIFEST}
        strange = sorted(p.name for p in self.folder.iterdir() if not p.is_dir() and p.name not in named)
        if strange:  # a graph could read its weights from there, unhashed
            raise BundleError(
                f"'{self.folder}' holds files its manifest does not name: {', '.join(strange[:4])}; remove them, or "
                "copy the bundle again"
            )
        with self._reading(WEIGHTS), safe_open(str(self.path(WEIGHTS)), framework="np") as file:
            said = json.loads((file.metadata() or {}).get("tarflow.config", "null"))
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if said != asdict(self.manifest.config):
            raise _damaged(self.folder, f"'{self.folder}': the manifest describes another model than its weights do")
        if wrong := unsupported(self.manifest.config, shapes):
            raise _damaged(self.folder, f"'{self.folder / WEIGHTS}' holds another model than it describes: {wrong}")

    def tensors(self, name: str) -> dict[str, NDArray[Any]]:
        """All tensors of a small safetensors file in the bundle, as numpy arrays. Checked first."""
        from safetensors.numpy import load_file

        self.check(name)
        with self._reading(name):
            return load_file(self.path(name))

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
            raise _damaged(self.folder, f"'{self.folder / name}' {failed} ({error})") from None


def _require_inside(folder: Path, path: Path) -> None:
    """Raise BundleError unless ``path`` is a regular file that lies, links followed, in ``folder``."""
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise _damaged(folder, f"'{path}' is missing, though the manifest names it") from None
    if not resolved.is_relative_to(folder.resolve()) or not resolved.is_file():
        raise BundleError(f"'{path}' leads out of the bundle or is no regular file; a bundle's files lie inside it")


def _damaged(folder: Path, what: str) -> BundleError:
    remedy = Remedy("export", {"folder": folder, "force": True})
    return BundleError(f"{what}. {AGAIN[0].upper()}{AGAIN[1:]}", remedy=remedy)
