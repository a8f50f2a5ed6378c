"""Shards: every byte follows from the job; what is finished is never drawn again, what is damaged always."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from safetensors.numpy import load_file
from typer.main import get_command

from tarflow.cli.options import Ray, RayCommand
from tarflow.runtime.backend import Array
from tarflow.runtime.chain import Chain
from tarflow.runtime.errors import BundleError, InputError, MachineError
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.image import to_uint8
from tarflow.runtime.native import library
from tarflow.runtime.opening import Opening
from tarflow.runtime.request import Request, Resolved
from tarflow.runtime.samples import Samples
from tarflow.shards.draw import draw
from tarflow.shards.engine import on_engine
from tarflow.shards.folder import INDEX, JOB, claimed, write_index
from tarflow.shards.job import Job, Shard
from tarflow.shards.record import Record, finished
from tarflow.shards.workers import Local, Lost, Ready, Task, Worker, carry_out

from .conftest import DEMO, GOLDEN, Cli, python, refused, report_of, said, until
from .test_filesystems import mounts

ARGUMENTS = ("generate", DEMO, "--labels", "0-9", "--threads", 1)


@pytest.fixture(scope="module")
def flow() -> Flow:
    """The demo on ONNX Runtime, which draws jobs that record no engine."""
    return Flow.open(DEMO, "cpu", threads=1)


@pytest.fixture(scope="module")
def job(flow: Flow) -> Job:
    """Samples 20 ... 99 in four shards, the first and the last short."""
    return Job.of(flow.bundle, Request(80, (0, 1, 2), seed=5, first_sample=20, certify=True), shard_size=32)


@pytest.fixture(scope="module")
def images(flow: Flow, job: Job) -> Samples:
    """All of the job's samples, as one batch."""
    labels = np.arange(80) % 3
    return flow.sample(80, labels=labels, seed=5, first_sample=20, certify=True, reproducible=True)


@pytest.fixture(scope="module")
def drawn(flow: Flow, job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job, drawn by this process in order; read-only."""
    folder = tmp_path_factory.mktemp("drawn") / "out"
    whole(flow, job, folder, job.shards())
    return folder


def whole(flow: Flow, job: Job, folder: Path, order: list[Shard]) -> None:
    with claimed(folder, job):
        records = {shard.number: draw(flow, job, shard, folder) for shard in order}
        write_index(folder, job, [records[shard.number] for shard in job.shards()])


def seeded(job: Job, seed: int) -> Job:
    return replace(job, request=replace(job.request, seed=seed))


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, by name, with its hash: hidden ones too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tarflow.cli.main", *map(str, (*ARGUMENTS, *arguments))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_shards(folder: Path, count: int) -> None:
    until(lambda: len(list((folder / "records").glob("shard-*.json"))) >= count)


def check_stop(process: subprocess.Popen[str], folder: Path) -> None:
    """SIGTERM, once a shard is finished."""
    wait_for_shards(folder, 1)
    process.terminate()
    _, told = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "the same command continues" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(("n", "first", "size"), [(80, 20, 32), (1, 0, 16), (64, 64, 32), (100, 31, 16), (5, 14, 1024)])
def test_shards_cover_every_sample_once_and_end_where_the_index_says(n: int, first: int, size: int) -> None:
    shards = Job(Resolved(n, first_sample=first), "hash", shard_size=size).shards()
    assert [i for shard in shards for i in range(shard.first, shard.first + shard.samples)] == [
        *range(first, first + n)
    ]
    assert all((shard.first + shard.samples) % size == 0 for shard in shards[:-1])
    assert [shard.number for shard in shards] == [*range(len(shards))]


HASH = "f31383a2ecc86e74bfd19340effcb978989c09b25919adb64ffbf6a94bb27a2c"
PLAIN = Job(Resolved(33, denoise=1.0, certify=True), HASH)
GUIDED = Resolved(40, (6, 3, -1, 5), Guidance(2.0, "b", True, 0.9), 2**64 - 1, 7, False, redraw_nonfinite=True)
BEGUN = Job(replace(GUIDED, decode="fast", tolerance=0.002, reproducible=True), HASH, "safetensors", 32)


def test_a_folder_that_was_begun_before_is_continued(tmp_path: Path) -> None:
    """By b0b510c: a job.json of defaults, and a folder of two shards of which the second is there."""
    assert PLAIN.text == (GOLDEN / "shards" / "plain.json").read_bytes()
    before = contents(shutil.copytree(GOLDEN / "shards" / "begun", tmp_path / "out"))
    with claimed(tmp_path / "out", BEGUN):
        assert [finished(tmp_path / "out", BEGUN, shard) is not None for shard in BEGUN.shards()] == [False, True]
    assert contents(tmp_path / "out") == before


def test_an_option_that_is_added_later_is_in_a_job_only_where_it_says_something() -> None:
    @dataclass(frozen=True, slots=True)
    class Guided(Guidance):
        until: float = 1.0

    @dataclass(frozen=True, slots=True)
    class Later(Resolved):
        truncation: float = 1.0

    plain = Job(Resolved(16, guidance=Guidance(1.0)), "hash")
    assert Job(Later(16, guidance=Guided(1.0)), "hash").text == plain.text
    said = Job(Later(16, guidance=Guided(1.0, until=0.5), truncation=0.9), "hash")
    assert said.content == plain.content | {"truncation": 0.9, "guidance": plain.content["guidance"] | {"until": 0.5}}
    assert said.differences(plain.content)[1] == "truncation is null there, 0.9 here"


def test_every_format_reads_back_as_what_the_library_draws(
    flow: Flow, job: Job, images: Samples, tmp_path: Path
) -> None:
    shard = job.shards()[1]
    expected, labels = np.asarray(images)[12:44], [*(np.arange(12, 44) % 3)]
    pixels, certificate, log_prob = to_uint8(expected)[:, 0], images.certificate, images.log_prob
    assert certificate is not None
    assert log_prob is not None
    for name in ("npy", "safetensors", "png", "tar"):
        this = replace(job, format=name)
        with claimed(tmp_path / name, this):
            draw(flow, this, shard, tmp_path / name)
    assert np.array_equal(np.load(tmp_path / "npy" / "shard-000001.npy"), expected)
    tensors = load_file(tmp_path / "safetensors" / "shard-000001.safetensors")
    assert np.array_equal(tensors["images"], expected)
    assert np.array_equal(tensors["certificate"], certificate[12:44])
    assert np.array_equal(tensors["log_prob"], log_prob[12:44])
    assert tensors["log_prob"].dtype == np.float64
    record = finished(tmp_path / "npy", replace(job, format="npy"), shard)
    assert record is not None
    assert record.log_prob == tuple(log_prob[12:44].tolist())
    path = tmp_path / "npy" / "records" / "shard-000001.json"
    whole = json.loads(path.read_text())
    for other in ([0.0], ["0"] * 32, "none"):
        path.write_text(json.dumps(whole | {"log_prob": other}))
        assert finished(tmp_path / "npy", replace(job, format="npy"), shard) is None, "damaged: drawn again"
    path.write_text(json.dumps({name: value for name, value in whole.items() if name != "log_prob"}))
    assert finished(tmp_path / "npy", replace(job, format="npy"), shard) is not None, "as versions before wrote it"
    assert [*tensors["labels"]] == labels
    assert [*tensors["samples"]] == [*range(32, 64)]
    pictures = sorted((tmp_path / "png" / "shard-000001").iterdir())
    assert pictures[0].name == "0000000000000000032.png"
    assert np.array_equal([np.asarray(Image.open(io.BytesIO(p.read_bytes()))) for p in pictures], pixels)
    with tarfile.open(tmp_path / "tar" / "shard-000001.tar") as archive:
        members = archive.getmembers()
        read = [archive.extractfile(member) for member in members]
        texts = [file.read() for file in read if file is not None]
    assert [m.name for m in members[:3]] == [f"0000000000000000032.{kind}" for kind in ("png", "cls", "json")]
    assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
    assert texts[0::3] == [p.read_bytes() for p in pictures]
    assert [int(text) for text in texts[1::3]] == labels
    about = json.loads(texts[5])
    assert (about["seed"], about["sample"], about["label"]) == (5, 33, labels[1])
    assert about["log_prob"] == log_prob[13]


def test_another_order_gives_the_same_files_and_the_index_tells_what_is_in_them(
    flow: Flow, job: Job, images: Samples, drawn: Path, tmp_path: Path
) -> None:
    whole(flow, job, tmp_path / "out", job.shards()[::-1])
    assert contents(tmp_path / "out") == contents(drawn)
    index = json.loads((drawn / INDEX).read_text())
    assert np.array_equal(np.concatenate([np.load(drawn / s["name"]) for s in index["shards"]]), images)
    certificate = report_of(images).certificate
    assert certificate is not None
    assert index["certificate"] == float(certificate.max())
    assert (index["samples"], index["nonfinite"], index["job"]["bundle"]) == (80, [], flow.bundle.hash)
    assert {s["name"]: s["sha256"] for s in index["shards"]}.items() <= contents(drawn).items()
    assert index["level"].startswith("L1")


def test_only_damaged_shards_are_drawn_again_and_the_folder_ends_the_same(cli: Cli, tmp_path: Path) -> None:
    options = (*ARGUMENTS, "--n", 80, "--shard-size", 16, "--out", tmp_path / "out", "--format", "png", "--json")
    said(cli(*options))
    before = contents(tmp_path / "out")
    pictures = sorted((tmp_path / "out").glob("shard-*/*.png"))
    pictures[0].unlink()
    os.truncate(pictures[20], 50)
    pictures[79].write_bytes(pictures[78].read_bytes())
    (tmp_path / "out" / "records" / "shard-000002.json").write_text('{"job": 3}')
    (tmp_path / "out" / ".shard-000003.abc").mkdir()  # what a killed process leaves
    kept = pictures[50].stat().st_mtime_ns
    found = said(cli(*options))
    assert (found["drawn"], found["kept"]) == (64, 16)
    assert contents(tmp_path / "out") == before
    assert pictures[50].stat().st_mtime_ns == kept
    third = said(cli(*options))
    assert (third["drawn"], third["kept"]) == (0, 80)


def test_two_processes_write_the_same_files_and_one_that_is_killed_is_replaced(
    job: Job, drawn: Path, tmp_path: Path
) -> None:
    folder, records = tmp_path / "out", list[Record]()
    with claimed(folder, job):
        crew = _Deadly(Task(job, DEMO, folder, Opening(memory="least")), 2)
        try:
            carry_out(crew, job.shards(), records.append)
        finally:
            crew.close()
        write_index(folder, job, sorted(records, key=lambda record: record.first_sample))
    assert crew.lost == 1
    assert contents(folder) == contents(drawn)


class _Deadly(Local):
    """Kills the worker that is handed the first shard."""

    lost = 0

    def hand(self, worker: int, shard: Shard) -> None:
        super().hand(worker, shard)
        process = self._workers[worker][0]
        if not self.lost and process.pid:
            os.kill(process.pid, signal.SIGKILL)
            self.lost += 1


def test_a_shard_that_kills_every_worker_ends_the_run_with_a_reason() -> None:
    news = cycle([Ready(), Lost("no memory")])  # one worker that opens and then always dies
    crew: Any = SimpleNamespace(hand=lambda worker, shard: None, wait=lambda: (0, next(news)))
    with pytest.raises(MachineError, match=r"draws shard 7 dies, 5 by now \(no memory\)"):
        carry_out(crew, [Shard(7, 0, 16)], lambda record: None)


def test_a_driver_that_is_killed_loses_nothing_finished(job: Job, cli: Cli, tmp_path: Path) -> None:
    options = ("--n", 512, "--shard-size", 16, "--no-certify", "--no-denoise")
    killed = run(*options, "--out", tmp_path / "killed", "--workers", 2)
    wait_for_shards(tmp_path / "killed", 3)
    workers = [Path(f"/proc/{pid}") for pid in children(killed.pid)]
    assert len(workers) >= 2
    killed.kill()
    killed.communicate()
    until(lambda: not any(worker.exists() for worker in workers))  # nor write on, in another's folder by then
    assert not (tmp_path / "killed" / INDEX).exists()
    again = said(cli(*ARGUMENTS, *options, "--out", tmp_path / "killed", "--json"))
    assert 48 <= again["kept"] < 512
    said(cli(*ARGUMENTS, *options, "--out", tmp_path / "undisturbed", "--json"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_sigterm_keeps_finished_shards_and_says_how_to_go_on(tmp_path: Path) -> None:
    check_stop(run("--n", 100_000, "--shard-size", 16, "--out", tmp_path / "out"), tmp_path / "out")
    assert not list((tmp_path / "out").rglob(".*")), "half-written files"


def test_a_job_of_the_native_engine_is_continued_by_it_alone(cli: Cli, tmp_path: Path) -> None:
    words = ("generate", DEMO, "--n", 32, "--shard-size", 16, "--no-denoise", "--out", tmp_path / "s")
    assert cli(*words, "--provider", "native", "--precision", "int16").returncode == 0
    assert json.loads((tmp_path / "s" / "job.json").read_text())["job"]["engine"] == "native int16"
    (tmp_path / "s" / "shard-000001.npy").unlink()
    refused = cli(*words, "--provider", "cpu")
    assert refused.returncode == 2
    assert 'engine is "native int16" there, null here' in refused.stderr
    assert cli(*words, "--threads", 1).returncode == 0  # auto: the engine that is recorded
    flow = Flow.open(DEMO, provider="native", precision="int16")
    assert np.array_equal(np.load(tmp_path / "s" / "shard-000001.npy"), flow.sample(16, first_sample=16, denoise=False))


def test_under_auto_a_job_records_its_engine_and_one_that_records_none_stays_with_onnx_runtime(
    cli: Cli, tmp_path: Path
) -> None:
    words = ("generate", DEMO, "--n", 32, "--shard-size", 16, "--no-denoise", "--no-certify", "--out")
    assert cli(*words, tmp_path / "new").returncode == 0
    assert json.loads((tmp_path / "new" / "job.json").read_text())["job"]["engine"] == "native fp32"
    assert cli(*words, tmp_path / "old", "--provider", "cpu").returncode == 0
    assert "engine" not in json.loads((tmp_path / "old" / "job.json").read_text())["job"]
    before = contents(tmp_path / "old")
    (tmp_path / "old" / "shard-000001.npy").unlink()
    assert cli(*words, tmp_path / "old").returncode == 0
    assert {name: before[name] for name in before if name.endswith(".npy")} == {
        name: content for name, content in contents(tmp_path / "old").items() if name.endswith(".npy")
    }


def test_a_worker_without_the_job_s_engine_is_refused_in_a_sentence(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    library.load.cache_clear()
    native = replace(job, engine="native int8")
    task = Task(native, DEMO, tmp_path, on_engine(native.engine, Opening()))
    try:
        with pytest.raises(MachineError, match=r"on .*, the job's engine, native int8, is not to be had: .*compiler"):
            Worker(task).open()
    finally:
        library.load.cache_clear()
    with pytest.raises(InputError, match="drawn by 'abacus'; expected native and one of fp32, int16, bf16, int8"):
        on_engine("abacus", Opening())


def test_a_folder_of_something_else_is_refused_and_left_alone(job: Job, drawn: Path, tmp_path: Path) -> None:
    before = contents(drawn)
    with pytest.raises(InputError, match="holds another job: seed is 5 there, 6 here"), claimed(drawn, seeded(job, 6)):
        pass
    assert contents(drawn) == before
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"holds other files \(thesis.tex\)"), claimed(tmp_path, job):
        pass
    (tmp_path / "thesis.tex").rename(tmp_path / JOB)
    with pytest.raises(InputError, match="cannot read the job in"), claimed(tmp_path, job):
        pass
    with pytest.raises(InputError, match="is a file"), claimed(tmp_path / JOB, job):
        pass


def test_a_disk_s_lost_and_found_is_no_other_file(job: Job, tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    with claimed(tmp_path, job):
        pass
    assert (tmp_path / "lost+found").is_dir()


@mounts
def test_a_finished_folder_is_accepted_where_nothing_can_be_written(cli: Cli, tmp_path: Path) -> None:
    options = [*ARGUMENTS, "--n", 32, "--shard-size", 16, "--out", tmp_path / "out", "--json"]
    assert cli(*options).returncode == 0
    mounted = 'mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"; shift; exec "$@"'
    command = [sys.executable, "-m", "tarflow.cli.main", *options]
    again = ["unshare", "-m", "sh", "-c", mounted, "sh", *map(str, (tmp_path / "out", *command))]
    finished = subprocess.run(again, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["kept"] == 32
    (tmp_path / "out" / "shard-000001.npy").unlink()
    missing = subprocess.run(again, capture_output=True, text=True, check=False)
    assert missing.returncode == 3
    assert "cannot be written: Read-only file system" in missing.stderr


def test_a_run_that_is_refused_touches_nothing_of_the_one_that_has_the_folder(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with claimed(out, job):
        half = out / ".shard-000000.npy.abcdef"
        half.write_bytes(b"half of it")
        (out / ".shard-000001.uvwxyz").mkdir()
        (out / ".shard-000001.uvwxyz" / "0000000000000000032.png").write_bytes(b"a picture")
        before = contents(out)
        with pytest.raises(InputError, match="another run"), claimed(out, job):
            pass
        assert contents(out) == before
    assert not out.exists(), "nothing was finished, nothing is left"


def test_a_worker_whose_driver_is_gone_does_not_write_into_another_job_s_folder(
    flow: Flow, job: Job, tmp_path: Path
) -> None:
    with claimed(tmp_path / "out", other := seeded(job, 6)):
        record = draw(flow, other, other.shards()[0], tmp_path / "out")
        with pytest.raises(MachineError, match="not the folder that the job writes to"):
            draw(flow, job, job.shards()[0], tmp_path / "out")
        assert finished(tmp_path / "out", other, other.shards()[0]) == record


def test_a_shard_without_a_label_is_drawn_in_a_job_that_has_some(flow: Flow, tmp_path: Path) -> None:
    request = Request(17, (-1, 0), Guidance(1.0))
    whole(flow, job := Job.of(flow.bundle, request, shard_size=16), tmp_path / "out", job.shards())
    labels = np.arange(17) % 2 - 1
    expected = flow.sample(17, labels=labels, guidance=Guidance(1.0), reproducible=True)
    assert np.array_equal(np.load(tmp_path / "out" / "shard-000001.npy"), expected[16:])
    with pytest.raises(InputError, match="does nothing"):
        Job.of(flow.bundle, replace(request, labels=(-1,)))


def test_a_finite_sample_that_cannot_be_encoded_again_is_listed(flow: Flow, job: Job, tmp_path: Path) -> None:
    class Overflowing(Chain):
        def round_trip(self, found: Array, z: Array) -> Array:
            error = super().round_trip(found, z)
            error[3] = np.inf
            return error

    spoiled = Flow(flow.bundle, flow.backend)
    spoiled.chain = Overflowing(flow.config, flow.backend, flow.deviation)
    with claimed(tmp_path / "out", job):
        record = draw(spoiled, job, job.shards()[1], tmp_path / "out")
    assert record.uncertified == (32 + 3, 48 + 3)
    assert record.certificate is not None
    assert record.certificate < 1e-3
    assert record.nonfinite == ()


@pytest.mark.parametrize("text", ["", "[]", "\xff", "null", "[" * 99_999, {"certificate": "none"}, {"size": "much"}])
def test_what_is_no_record_or_another_job_s_counts_for_nothing(
    job: Job, drawn: Path, tmp_path: Path, text: str | dict[str, str]
) -> None:
    shutil.copytree(drawn, tmp_path / "out")
    shard, record = job.shards()[0], tmp_path / "out" / "records" / "shard-000000.json"
    assert finished(tmp_path / "out", job, shard) is not None
    assert finished(tmp_path / "out", seeded(job, 6), shard) is None
    spoiled = json.dumps(json.loads(record.read_text()) | text) if isinstance(text, dict) else text
    record.write_text(spoiled, "latin-1")
    assert finished(tmp_path / "out", job, shard) is None
    record.unlink()
    os.mkfifo(record)  # nobody writes to it: it is not waited for
    assert finished(tmp_path / "out", job, shard) is None


def test_an_index_says_when_kinds_of_machine_were_mixed(job: Job, drawn: Path, tmp_path: Path) -> None:
    records = [record for shard in job.shards() if (record := finished(drawn, job, shard))]
    mixed = [replace(records[0], engine="ONNX Runtime 1, CPU, another"), *records[1:]]
    index = write_index(tmp_path, job, mixed)
    assert len(index["engines"]) == 2
    assert index["level"].startswith("L2: drawn on 2 kinds of machine")
    with pytest.raises(BundleError, match="do not cover the job once"):
        write_index(tmp_path, job, [*records, records[0]])


def test_a_limit_of_memory_that_rounds_differently_is_another_kind_of_machine(flow: Flow) -> None:
    enough, tight = (Flow.open(DEMO, "cpu", memory=size << 20).backend.description for size in (400, 270))
    assert (enough, tight) == (flow.backend.description, f"{enough}, within 270.0 MiB")


def test_samples_that_are_not_finite_are_listed_and_fail_the_check(cli: Cli, tmp_path: Path) -> None:
    done = cli(*ARGUMENTS, "--n", 16, "--guidance", 1000, "--out", tmp_path / "out", "--json")
    assert done.returncode == 1
    assert "samples (0, 1, 2" in done.stderr
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["nonfinite"]
    images = np.load(tmp_path / "out" / "shard-000000.npy")
    assert [i for i in range(16) if not np.isfinite(images[i]).all()] == index["nonfinite"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--ray", "--ray means nothing without --out"),
        ("--out o --shard-size 20", "multiple of 16"),
        ("--out o --format zip", "expected one of npy"),
        ("--out o --workers 0", "expected 1 or more"),
        ("--out o --tolerance nan", "--tolerance is nan"),
        ("--out o --labels 7-12", "label 10 is out of range"),
        ("--out o --n 1000000000000", "--shard-size is 1024; expected 1000016 or more"),
    ],
)
def test_options_that_make_no_job_are_refused_before_anything_is_written(
    tarflow: Cli, options: str, words: str
) -> None:
    refused(tarflow("generate", DEMO, *options.split()), 2, words)


def test_without_ray_the_missing_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['ray'] = None\n"
        f"sys.argv = ['tarflow', 'generate', '--out', {str(tmp_path / 'o')!r}, '--ray']\n"
        "from tarflow.cli.main import main\nmain()"
    )
    refused(python("-c", code), 3, "pip install 'tarflow[ray]'")


@pytest.mark.parametrize(
    ("words", "ray", "rest"),
    [
        (["--ray", "bundle"], "", ["bundle"]),
        (["bundle", "--ray"], "", ["bundle"]),
        (["--ray", "--workers", "2"], "", []),
        (["--ray", "auto", "bundle"], "auto", ["bundle"]),
        (["bundle", "--ray", "10.0.0.1:6379"], "10.0.0.1:6379", ["bundle"]),
        (["--ray", "ray://head:10001"], "ray://head:10001", []),
        (["--ray=head"], "head", []),
        (["bundle"], None, ["bundle"]),
    ],
)
def test_ray_takes_an_address_or_stands_alone(words: list[str], ray: str | None, rest: list[str]) -> None:
    seen: dict[str, object] = {}
    app = typer.Typer()

    @app.command(cls=RayCommand)
    def command(bundle: str = typer.Argument(""), workers: int = 1, ray: Ray = None) -> None:
        seen.update(ray=ray, rest=[bundle] if bundle else [])

    get_command(app).main(words, standalone_mode=False)
    assert seen == {"ray": ray, "rest": rest}
