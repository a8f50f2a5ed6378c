"""Files: written whole or not at all, as shared as their user says, and never unpickled."""

from __future__ import annotations

import io
import os
import pickle
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tarflow.cli.console import read_array
from tarflow.runtime.bundle import MANIFEST
from tarflow.runtime.errors import InputError
from tarflow.runtime.files import replacing, replacing_folder


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, and what files hold."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        with replacing(path) as file:
            file.write(b"n")
            file.flush()
            assert path.read_bytes() == b"old"
            file.write(b"ew")
        assert reader.read() == b"old", "who has it open keeps reading the old one"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_while_writing_leaves_the_old_file_or_folder(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / MANIFEST).write_text('{"format": "tarflow-bundle"}')
    before = contents(tmp_path)
    with pytest.raises(error), replacing(tmp_path / "x") as file:  # noqa: PT012
        file.write(b"new")
        raise error
    with pytest.raises(error), replacing_folder(tmp_path / "bundle", True) as partial:  # noqa: PT012
        (partial / MANIFEST).write_text("new")
        raise error
    assert contents(tmp_path) == before


def test_a_new_file_has_the_rights_the_user_gives_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "replaced") as file:
        file.write(b"x")
    with replacing_folder(tmp_path / "made", False) as folder:
        (folder / "inside").touch(0o600)  # as safetensors does; what is made is made to be handed on
    (tmp_path / "folder").mkdir()
    mode = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert (mode["replaced"], mode["inside"], mode["made"]) == (mode["plain"], mode["plain"], mode["folder"])


class Bomb:
    """Unpickling this makes a folder: what a malicious file would do, made visible."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def header(text: str) -> bytes:
    """The beginning of an .npy file that says this of itself."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def saved(save: Callable[..., None], array: np.ndarray[Any, Any], **options: bool) -> bytes:
    save(file := io.BytesIO(), array, **options)
    return file.getvalue()


SPOILED: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda bomb: b"",
    "text": lambda bomb: b"0 1 2 3",
    "truncated": lambda bomb: saved(np.save, np.zeros(9))[:-4],
    "header only": lambda bomb: header("")[:8],
    "terabytes": lambda bomb: header("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 16, 12), }\n"),
    "code": lambda bomb: header(f"{{'descr': __import__('os').mkdir('{bomb}'), 'shape': (1,), }}\n"),
    "no last brace": lambda bomb: header("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1), \n"),
    "no size": lambda bomb: header("{'descr': '<f4', 'fortran_order': False, 'shape': (True,), }\n"),
    "beyond any size": lambda bomb: header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**30},), }}\n"),
    "brackets": lambda bomb: header("(" * 9_000 + "\n"),
    "npz": lambda bomb: saved(np.savez, np.zeros(9)),
    "zip cut short": lambda bomb: b"PK\x03\x04" + b"\0" * 40,
    "pickle": lambda bomb: pickle.dumps(Bomb(bomb)),
    "objects": lambda bomb: saved(np.save, np.array([Bomb(bomb)], object), allow_pickle=True),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_file_that_is_no_array_is_refused_and_never_unpickled(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(SPOILED[kind](tmp_path / "bomb"))
    for path in (tmp_path / "a.npy", tmp_path, tmp_path / "absent.npy"):
        with pytest.raises(InputError, match=re.escape(f"'{path}'")):
            read_array(path, "noise")
    assert not (tmp_path / "bomb").exists()
