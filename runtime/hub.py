"""What lies on the Hugging Face hub, ``hf:OWNER/REPO/FILE@REVISION``, by way of the hub's own cache.

FILE is a checkpoint, or the folder of a bundle; without it the repository is the bundle. The revision, a branch, a tag
or a commit, is resolved once, and all files are those of its commit. What is in the cache needs no network.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import InputError, MachineError, TarflowError
from .manifest import MANIFEST, MANIFEST_LIMIT, read_manifest, reader_of

_PLACE = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>.+?))?/?(?:@(?P<revision>[^@]+))?")
_CACHED = re.compile(r"/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[^/]+)(?P<file>/.+)?$")
INDEX = ".index.json"  # how the name of an index of shards ends
CLASS_NAMES = ".classes.txt"  # the suffix of the names that training leaves beside a checkpoint
_AT_ONCE = 8  # files of a bundle
_LONGEST = 200  # characters of the client's own words
Place = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class _There:
    """A place on the hub; ``file`` "": the repository itself."""

    repo: str
    file: str
    revision: str | None

    def __str__(self) -> str:
        file, revision = self.file and f"/{self.file}", f"@{self.revision}" if self.revision else ""
        return f"hf:{self.repo}{file}{revision}"

    def inside(self, name: str) -> str:
        return f"{self.file}/{name}" if self.file else name


def bundle_at(place: Place) -> Path:
    """The folder of a bundle: a path as it is; a place on the hub fetched, the files that its manifest names.

    Raises InputError for what is not on the hub, or is no place; MachineError without ``huggingface_hub``, and for what
    is neither within reach nor in the cache.
    """
    there = _parsed(place)
    return Path(place) if there is None else _bundle(there)


def checkpoint_at(place: Place) -> Path:
    """The file of a checkpoint, shards with their index, or the folder of a bundle. Raises as :func:`bundle_at`."""
    there = _parsed(place)
    if there is None:
        return Path(place)
    if not there.file:
        return _bundle(there)
    try:
        found = _get(there, there.file)
    except TarflowError as absent:  # then it may be a folder
        try:
            return _bundle(there)
        except TarflowError:
            raise absent from None
    there = replace(there, revision=_commit(found, there))
    for name in _beside(found):
        _get(there, str(Path(there.file).with_name(name)))
    with contextlib.suppress(TarflowError):  # there may be none
        _get(there, str(Path(there.file).with_suffix(CLASS_NAMES)))
    return found


def origin(path: Path) -> str | None:
    """``hf:OWNER/REPO/FILE@COMMIT`` of a file or folder in the hub's cache; None elsewhere."""
    found = _CACHED.search((Path(os.path.realpath(path.parent)) / path.name).as_posix())
    return found and f"hf:{found['owner']}/{found['name']}{found['file'] or ''}@{found['commit']}"


def _parsed(place: Place) -> _There | None:
    text = os.fspath(place)
    if not text.startswith("hf:"):
        return None
    found = _PLACE.fullmatch(text)
    if not found or {"", ".", ".."} & {*(found["file"] or "file").split("/")}:
        raise InputError(f"'{text}' is no place on the hub; expected hf:OWNER/REPO/FILE or hf:OWNER/REPO/FILE@REVISION")
    return _There(found["repo"], found["file"] or "", found["revision"])


def _bundle(there: _There) -> Path:
    manifest = _get(there, there.inside(MANIFEST))
    pinned = replace(there, revision=_commit(manifest, there))
    named = read_manifest(reader_of(str(manifest)).content(manifest, MANIFEST_LIMIT), str(manifest)).files
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda name: _get(pinned, pinned.inside(name)), named))
    return manifest.parent


def _beside(index: Path) -> list[str]:
    """The shards that an index names; what is no index is for its reader to refuse."""
    if not index.name.endswith(INDEX):
        return []
    try:
        names = sorted({*map(str, json.loads(index.read_bytes())["weight_map"].values())})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
    return [name for name in names if name == Path(name).name]


def _commit(path: Path, there: _There) -> str | None:
    found = _CACHED.search(path.absolute().as_posix())
    return found["commit"] if found else there.revision


def _get(there: _There, name: str) -> Path:
    """One file of the revision, in the cache by now."""
    client = _client()
    try:
        return Path(client.hf_hub_download(there.repo, name, revision=there.revision))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise _explained(client, error, there, name) from None
    except Exception as error:  # of whichever HTTP library the client is built on
        raise _explained(client, error, there, name) from None


def _client() -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        import huggingface_hub
    except ImportError:
        raise MachineError(
            "places that begin with hf: need huggingface_hub, which is not installed: pip install 'tarflow[hub]'"
        ) from None
    return huggingface_hub


def _explained(client: Any, error: Exception, there: _There, name: str) -> TarflowError:
    """What the client raised, as one sentence."""
    kinds = client.errors
    at = f"revision '{there.revision}'" if there.revision else "its main branch"
    unknown = kinds.LocalEntryNotFoundError
    cause = error.__cause__ if isinstance(error, unknown) else None  # the answer, where there was one
    status = getattr(getattr(cause or error, "response", None), "status_code", None)
    if isinstance(error, kinds.GatedRepoError):
        return InputError(
            f"'{there.repo}' is gated: accept its conditions on its page, and give a token that may read it in HF_TOKEN"
        )
    if isinstance(error, kinds.RepositoryNotFoundError):
        return InputError(
            f"the hub has no repository '{there.repo}', or it is private: look for a slip in OWNER/REPO, or give a "
            "token that may read it in HF_TOKEN"
        )
    if isinstance(error, kinds.RevisionNotFoundError):
        expected = "expected a branch, a tag or a commit"
        return InputError(f"'{there.repo}' has no revision '{there.revision}' on the hub; {expected}")
    if status == 404 or (isinstance(error, kinds.EntryNotFoundError) and not isinstance(error, unknown)):
        return InputError(f"'{there.repo}' has no file '{name}' at {at}; expected a checkpoint or a bundle: '{there}'")
    if isinstance(error, kinds.HFValidationError):
        return InputError(f"'{there}' is no place on the hub: {_first_line(error)}")
    if isinstance(error, unknown) and status is None:
        why = _first_line(cause) if cause else "HF_HUB_OFFLINE is set, or there is no network"
        return MachineError(
            f"'{name}' of '{there}' is not in the hub's cache, and the hub cannot be reached ({why}); fetch it where "
            "there is a network, or put what HF_HOME names in its place"
        )
    answered = f"the hub answered {status}" if status else _first_line(error)
    return MachineError(f"'{name}' of '{there}' could not be fetched: {answered}; try again later")


def _first_line(error: BaseException) -> str:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return said.replace("`", "")[:_LONGEST].rstrip(".")  # backquotes are for fields of ours
