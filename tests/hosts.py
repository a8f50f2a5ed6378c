"""Three hosts on this machine, for Ray: network namespaces on a bridge, a name, a home and a temporary folder for each.

Run as a program inside namespaces of its own (see ``apart``), whose end is the end of everything here. It draws a job
across the hosts while one worker is killed, one host is cut off and one is lost, and prints what it saw as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from .conftest import DEMO, until

NAMES = ("a", "b", "c")
HEAD = "10.77.0.1"
RAY = Path("/run/ray")  # where each host has its temporary folder: names of sockets are short
TOKEN = "a-token-of-these-three-hosts-and-nobody-elses-0123456789abcdef"
OPTIONS = "--n 1280 --labels 0-9 --guidance 1 --seed 5 --shard-size 16 --threads 1"
JOB = (str(DEMO), *OPTIONS.split())
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "300",  # the machine may be busy
    "RAY_health_check_period_ms": "1000",
}


def apart(*command: str) -> list[str]:
    """The command in namespaces of its own: network, mounts, processes. What it started ends with it."""
    return ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *command]


class Host:
    """One host: ``name``, an address, and what runs there."""

    def __init__(self, number: int, folder: Path) -> None:
        self.name, self.address, self.folder = NAMES[number], f"10.77.0.{number + 1}", folder
        ip(f"netns add {self.name}")
        ip(f"link add to-{self.name} type veth peer name eth0 netns {self.name}")
        ip(f"link set to-{self.name} master switch up")
        for order in (f"addr add {self.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            ip(f"-n {self.name} {order}")
        for part in ("home", "temporary"):
            (folder / self.name / part).mkdir(parents=True)

    def start(self, *command: str, token: bool = True, log: str = "log") -> subprocess.Popen[bytes]:
        """Run a command there; what it prints is added to a file in the host's folder."""
        mine = self.folder / self.name
        inside = f'hostname {self.name} && mount --bind {mine}/temporary {RAY} && exec "$@"'
        environment = os.environ | {"HOME": str(mine / "home")} | (_ENVIRONMENT if token else {})
        enter = ["ip", "netns", "exec", self.name, "unshare", "--mount", "--uts", "sh", "-c", inside, "sh"]
        with (mine / log).open("ab") as output:
            return subprocess.Popen([*enter, *command], stdout=output, stderr=subprocess.STDOUT, env=environment)

    def ray(self, *options: str) -> subprocess.Popen[bytes]:
        """Start Ray's processes."""
        usual = ("--num-cpus=1", "--object-store-memory=90000000", "--disable-usage-stats")
        return self.start(sys.executable, "-m", "ray.scripts.scripts", "start", *options, *usual)

    def generate(self, out: Path, token: bool = True) -> subprocess.Popen[bytes]:
        command = (sys.executable, "-m", "tarflow.cli.main", "generate", *JOB, "--out", str(out))
        return self.start(*command, "--ray", f"{HEAD}:6379", "--workers", "3", token=token, log="generate")

    def processes(self) -> dict[int, str]:
        """Command lines by process id."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        found = {}
        for pid in map(int, pids.stdout.split()):
            path = Path(f"/proc/{pid}/cmdline")
            found[pid] = path.read_bytes().decode().replace("\0", " ") if path.exists() else ""
        return found

    def kill(self, what: str = "") -> int:
        """Kill the processes whose command lines have ``what`` in them -> how many."""
        found = [pid for pid, command in self.processes().items() if what in command]
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        return len(found)

    def reachable(self, yes: bool) -> None:
        ip(f"link set to-{self.name} {'up' if yes else 'down'}")


def ip(order: str) -> None:
    subprocess.run(["ip", *order.split()], check=True)


def scenario(folder: Path) -> dict[str, object]:
    subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)  # what lies there is ours alone
    for order in ("link set lo up", "link add switch type bridge", "link set switch up"):
        ip(order)
    RAY.mkdir()
    hosts = a, b, c = [Host(number, folder) for number in range(3)]
    head = a.ray("--head", f"--node-ip-address={HEAD}", "--port=6379", f"--temp-dir={RAY}", "--include-dashboard=0")
    assert head.wait() == 0, (folder / "a" / "log").read_text()
    others = [host.ray(f"--address={HEAD}:6379", f"--node-ip-address={host.address}") for host in (b, c)]
    assert [other.wait() for other in others] == [0, 0], (folder / "b" / "log").read_text()

    out, seen = folder / "out", dict[str, object]()
    seen["exit code without a token"] = a.generate(out, token=False).wait()
    driver = a.generate(out)

    def wait_for_more(shards: int) -> None:
        """So many records more; or the end of the driver, which is not to be waited for."""
        wanted = len(records(out)) + shards
        until(lambda: len(records(out)) >= wanted or driver.poll() is not None)

    def drawing(host: Host) -> bool:
        return any("ray::Worker" in command for command in host.processes().values())

    until(lambda: all(map(drawing, hosts)) or driver.poll() is not None)
    wait_for_more(4)
    seen["killed workers"] = c.kill("ray::Worker")
    wait_for_more(4)
    b.reachable(False)
    wait_for_more(4)
    b.reachable(True)
    wait_for_more(4)
    seen["processes of the lost host"] = c.kill()
    seen["shards when it was lost"] = len(records(out))
    seen["exit code"] = driver.wait()
    return seen


def records(out: Path) -> list[Path]:
    return list((out / "records").glob("shard-*.json"))


if __name__ == "__main__":
    print(json.dumps(scenario(Path(sys.argv[1]))))
