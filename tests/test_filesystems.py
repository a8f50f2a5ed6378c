"""Where files and folders are put: mounts, overlays, file systems that lack what others have, and runs that are killed.

What is done there is in processes of their own: in a mount namespace, behind calls that fail, or killed in the middle.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tarflow.cli.doctor import left_here
from tarflow.runtime.bundle import MANIFEST
from tarflow.runtime.errors import MachineError
from tarflow.runtime.files import check_replaceable, check_room, replacing, replacing_folder

from .conftest import DEMO, Cli
from .test_files import contents

mounts = pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0, reason="no namespaces"
)
OLD = {MANIFEST: b'{"format": "tarflow-bundle"}', "block_00.step.onnx": b"old", "weights.safetensors": b"old"}
NEW = {MANIFEST: b'{"format": "tarflow-bundle", "new": 1}', "weights.safetensors": b"new"}
WRITE = f"""
import os, sys
from pathlib import Path
from tarflow.runtime.files import replacing, replacing_folder

def write(path):
    with replacing_folder(path, True) as partial:
        for name, content in {NEW}.items():
            (partial / name).write_bytes(content)
"""
# Killed before every call that opens, renames, makes or removes, until a run comes through; each in a fork of its own.
KILL = (
    WRITE
    + f"""
import shutil, signal
from tarflow.runtime.hidden import restore

def files(path):
    return {{inside.name: inside.read_bytes() for inside in path.iterdir()}} if path.exists() else None

def run(deadly):
    def hook(event, arguments, seen=[]):
        if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "tempfile.mkdtemp", "open"):
            seen.append(event)
            if len(seen) == deadly:
                os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        sys.addaudithook(hook)
        write(place)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0

place, stood = Path(sys.argv[1]), set()
for deadly in range(1, 200):
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name, content in {OLD}.items():
        (place / name).write_bytes(content)
    if run(deadly):
        break
    found = files(place)
    assert found is not None or sys.argv[2] == "two renames", deadly
    restore(place)
    found = files(place)
    assert found in ({OLD}, {NEW}), deadly
    stood.add(len(found))
    assert run(0), deadly
    assert files(place) == {NEW}, deadly
    assert [inside.name for inside in place.parent.iterdir()] == [place.name], deadly
assert deadly > 20 and stood == {{2, 3}}, (deadly, stood)
"""
)
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#define WRAP(name, fails, declared, given)                                  \\
    int name declared {                                                      \\
        const char *v = getenv("FAILS_" #name);                              \\
        if (v && (fails)) { errno = atoi(v); return -1; }                    \\
        return ((int(*) declared)dlsym(RTLD_NEXT, #name)) given;             \\
    }
static int folder(int fd) { struct stat s; return fstat(fd, &s) == 0 && S_ISDIR(s.st_mode); }
WRAP(fsync, folder(fd) != (getenv("OF_FILES") != 0), (int fd), (fd))
WRAP(chmod, 1, (const char *path, mode_t mode), (path, mode))
WRAP(renameat2, 1, (int a, const char *from, int b, const char *to, unsigned how), (a, from, b, to, how))
"""


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that lets calls fail, by environment variables."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    source = tmp_path_factory.mktemp("shim") / "shim.c"
    source.write_text(SHIM)
    library = source.with_suffix(".so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def old_bundle(path: Path) -> Path:
    path.mkdir(parents=True)
    for name, content in OLD.items():
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("how", ["exchange", "two renames"])
def test_whenever_a_run_is_killed_a_whole_folder_stands_and_the_next_run_leaves_nothing_hidden(
    how: str, shim: Path, tmp_path: Path
) -> None:
    lacks = {"LD_PRELOAD": str(shim), "FAILS_renameat2": "38"} if how == "two renames" else {}
    done = run(sys.executable, "-c", KILL, tmp_path / "bundle", how, **lacks)
    assert done.returncode == 0, done.stderr


@mounts
@pytest.mark.parametrize(
    "mount",
    [
        "P=at; mount -t tmpfs none at; mkdir at/lost+found",
        "P=at; mkdir real; mount --bind real at",
        "P=at; mount -t tmpfs none .; cd ..; cd room; mkdir at; mount -t tmpfs none at; mount -o remount,ro .",
        "P=merged/at; mkdir up work merged; "
        "mount -t overlay o -o lowerdir=lower,upperdir=up,workdir=work,redirect_dir=off merged",
    ],
    ids=["a disk", "a bind mount", "a disk in a read-only folder", "a lower layer"],
)
def test_what_cannot_be_renamed_over_is_written_over_the_manifest_last(mount: str, tmp_path: Path) -> None:
    room = tmp_path / "room"
    shutil.copytree(old_bundle(room / "lower" / "at"), tmp_path / "old")
    (room / "at").mkdir()
    code = WRITE + "write(Path(sys.argv[1]))"
    killed = (
        WRITE + "def hook(event, arguments):\n"
        f"    if event == 'os.rename' and str(arguments[0]).endswith('/at/{MANIFEST}'):\n"
        "        os._exit(9)\nsys.addaudithook(hook)\nwrite(Path(sys.argv[1]))"
    )
    script = (
        f'set -e; cd "$1"; {mount}; cp -n "$1/../old"/* $P; "$2" -c "$4" $P || {{ ls -A $P | grep -v tarflow-; '
        f'echo "half: $(cat $P/{MANIFEST})" >&2; }}; echo; '
        '"$2" -c "$3" $P; ls -A $P; echo; cat $P/[mw]*; ls -A . | grep tarflow || true'
    )
    done = run("unshare", "-m", "sh", "-c", script, "sh", room, sys.executable, code, killed)
    assert done.returncode == 0, done.stderr
    cut_off, whole, content = done.stdout.split("\n\n")
    assert set(cut_off.split()) - {"lost+found"} == NEW.keys(), "and the next run still knows whose it is"
    assert f"half: {OLD[MANIFEST][:14].decode()}\n" in done.stderr
    assert set(whole.split()) - {"lost+found"} == NEW.keys()
    assert content == "".join(NEW[name].decode() for name in sorted(NEW))
    assert ("lost+found" in whole) == ("lost+found" in mount)
    assert "cannot be replaced at once" in done.stderr


@mounts
def test_a_mounted_file_is_written_over(tmp_path: Path) -> None:
    for name in ("real", "target"):
        (tmp_path / name).write_bytes(b"old and longer")
    code = "import sys\nfrom tarflow.runtime.files import replacing\nwith replacing(sys.argv[1]) as f: f.write(b'new')"
    for before in ("", "mount --bind . .; mount --bind real target; mount -o remount,ro,bind .;"):
        script = f'set -e; cd "$1"; mount --bind real target; {before} "$2" -c "$3" target; cat target; ls -A'
        done = run("unshare", "-m", "sh", "-c", script, "sh", tmp_path, sys.executable, code)
        assert (done.returncode, done.stdout) == (0, "newreal\ntarget\n"), done.stderr
        assert "cannot be replaced at once" in done.stderr


@pytest.mark.parametrize("number", ["22", "95", "1"], ids=["EINVAL", "ENOTSUP", "EPERM"])
def test_a_file_system_without_fsync_of_folders_and_rights_is_written_to(
    number: str, shim: Path, tmp_path: Path
) -> None:
    fails = {"LD_PRELOAD": str(shim), "FAILS_fsync": number, "FAILS_chmod": number}
    done = run(sys.executable, "-c", WRITE + "write(Path(sys.argv[1]))", tmp_path / "bundle", **fails)
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(tmp_path / "bundle") == NEW


@pytest.mark.parametrize(("number", "words"), [("5", "Input/output error"), ("28", "disk is full")])
def test_what_the_disk_has_lost_is_an_error(number: str, words: str, shim: Path, tmp_path: Path) -> None:
    fails = {"LD_PRELOAD": str(shim), "FAILS_fsync": number, "OF_FILES": "1"}
    done = run(sys.executable, "-c", WRITE + "write(Path(sys.argv[1]))", tmp_path / "bundle", **fails)
    assert "MachineError" in done.stderr
    assert words in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_result_that_cannot_take_its_place_is_kept_under_a_name_that_is_told(tmp_path: Path) -> None:
    def write_while_a_folder_appears() -> None:
        with replacing(tmp_path / "x") as writing:
            writing.write(b"work of hours")
            (tmp_path / "x").mkdir()

    def make_while_another_does() -> None:
        with replacing_folder(tmp_path / "bundle", False) as partial:
            old_bundle(partial / "inside")
            (tmp_path / "bundle").mkdir()

    with pytest.raises(MachineError, match=r"Is a directory.*kept as") as file:
        write_while_a_folder_appears()
    with pytest.raises(MachineError, match=r"appeared meanwhile.*kept as") as folder:
        make_while_another_does()
    kept = [Path(str(error.value).split("kept as '")[1].split("'")[0]) for error in (file, folder)]
    with replacing(tmp_path / "y") as writing:  # which sweeps
        writing.write(b"more")
    assert kept[0].read_bytes() == b"work of hours"
    assert contents(kept[1] / "inside") == OLD
    assert sorted(tmp_path.iterdir()) == sorted([*kept, *(tmp_path / name for name in ("x", "y", "bundle"))])


@pytest.mark.parametrize("name", ["x" * 255, "x" * 246 + ".png", "\N{SNOWMAN}" * 85])
def test_every_name_that_the_file_system_takes_is_taken(name: str, tmp_path: Path) -> None:
    with replacing(tmp_path / name) as file:
        file.write(b"new")
    (tmp_path / name).unlink()
    for _ in range(2):
        with replacing_folder(tmp_path / name, True) as partial:
            (partial / MANIFEST).write_bytes(OLD[MANIFEST])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_place_that_takes_nothing_is_refused_before_the_work(cli: Cli, tmp_path: Path) -> None:
    done = cli("likelihood", DEMO, tmp_path / "absent.npy", "--save", tmp_path / "absent" / "x.npz")
    assert done.returncode == 2
    assert "create it first: mkdir -p" in done.stderr
    with pytest.raises(MachineError, match="File name too long"), replacing(tmp_path / ("x" * 256)):
        pytest.fail("began the work")
    with pytest.raises(MachineError, match="cannot be written"):
        check_replaceable("/proc/bundle", force=False)
    with pytest.raises(MachineError, match=r"takes about 1073741824.0 GiB; its disk has .* left"):
        check_room(tmp_path / "new" / "bundle", 1 << 60)


def test_doctor_names_what_killed_runs_left_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill = f"\nwith replacing({str(tmp_path / 'run' / 'x')!r}) as file:\n    os.kill(os.getpid(), 9)"
    (tmp_path / "run").mkdir()
    assert run(sys.executable, "-c", WRITE + kill).returncode == -signal.SIGKILL
    monkeypatch.chdir(tmp_path)
    with replacing(tmp_path / "alive"):
        (problem,) = left_here()
    (hidden,) = (tmp_path / "run").iterdir()
    assert f"'run/{hidden.name}' was left by a run that was killed" in problem
