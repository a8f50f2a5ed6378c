"""A Containerfile's steps, carried out in a Debian root by chroot: as much of the format as ours use."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
_CA = "/etc/ssl/certs/ca-certificates.crt"


@dataclass
class Stage:
    """A root file system, and what has been said of it."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"})
    folder: str = "/"
    user: str = "0:0"
    health: list[str] = field(default_factory=list)
    entry: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def inside(self, command: list[str], **environment: str) -> str:
        """A line of shell that runs a command in the root, as its user, with its environment."""
        env = [f"{key}={value}" for key, value in (self.env | environment).items()]
        place = f'cd {shlex.quote(self.folder)} && exec "$@"'
        inner = ["env", "-i", *env, "sh", "-c", place, "sh", *command]
        return shlex.join(["chroot", f"--userspec={self.user}", str(self.root), *inner])

    def carry_out(self, script: str, timeout: float, *, network: bool = True) -> str:
        """Run shell lines in namespaces of their own, with the root's /dev and /proc; returns what they print."""
        root = shlex.quote(str(self.root))
        lines = f"set -e\nmount --bind /dev {root}/dev\nmount -t proc proc {root}/proc\n"
        lines += "" if network else "ip link set lo up\n"
        flags = ["--mount", "--pid", "--fork", "--kill-child", *([] if network else ["--net"])]
        ran = subprocess.run(
            ["unshare", *flags, "bash", "-c", lines + script],
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
        return ran.stdout


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, rest) of a Containerfile, lines joined."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def built(path: Path, base: Path, work: Path, timeout: float) -> Stage:
    """The last stage of a Containerfile, its steps carried out on copies of the root in the archive ``base``."""
    stages: dict[str, Stage] = {}
    stage = None
    for word, rest in instructions(path):
        if word == "FROM":
            name = rest.split(" AS ")[1] if " AS " in rest else "last"
            stage = stages[name] = Stage(work / name)
            _unpack(base, stage.root)
            continue
        assert stage is not None
        _step(stage, word, rest, stages, timeout)
    assert stage is not None
    return stage


def _step(stage: Stage, word: str, rest: str, stages: dict[str, Stage], timeout: float) -> None:
    if word == "RUN":
        own = {"PIP_CERT": "/host-ca.crt", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "DEBIAN_FRONTEND": "noninteractive"}
        stage.carry_out(stage.inside(["sh", "-c", rest], **own), timeout)
    elif word == "COPY":
        source, target = rest.removeprefix("--from=build ").split()
        place = stage.root / target.lstrip("/")
        if rest.startswith("--from="):
            shutil.copytree(stages["build"].root / source.lstrip("/"), place, symlinks=True, dirs_exist_ok=True)
        else:
            _context(place)
    elif word == "ENV":
        for pair in shlex.split(rest):
            key, _, value = pair.partition("=")
            stage.env[key] = re.sub(r"\$(\w+)", lambda found: stage.env[found[1]], value)
    elif word == "WORKDIR":
        stage.folder = rest
        (stage.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif word == "USER":
        stage.user = rest
    elif word == "HEALTHCHECK":
        stage.health = json.loads(rest.partition("CMD ")[2])
    elif word == "ENTRYPOINT":
        stage.entry = json.loads(rest)
    elif word == "CMD":
        stage.command = json.loads(rest)
    else:
        assert word == "EXPOSE", word


def _unpack(base: Path, root: Path) -> None:
    root.mkdir(parents=True)
    subprocess.run(["tar", "-xf", base, "-C", root], check=True)
    for name in ("/etc/resolv.conf", "/etc/hosts"):
        shutil.copyfile(name, root / name[1:])
    if os.path.exists(_CA):  # packages may come by way of a proxy
        shutil.copyfile(_CA, root / "host-ca.crt")


def _context(place: Path) -> None:
    """The files under version control that .dockerignore lets in."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = tuple(line[1:] for line in lines if line.startswith("!"))
    listed = subprocess.run(["git", "ls-files", "-z", *kept], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place / name, follow_symlinks=False)
