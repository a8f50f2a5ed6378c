"""Training: that it learns, that it resumes bit for bit, and that more processes train the same model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tarflow import checkpoint
from tarflow.checkpoint import CheckpointError
from tarflow.config import Config
from tarflow.runtime.errors import InputError, MachineError
from tarflow.train import loop
from tarflow.train.data import digits
from tarflow.train.loop import Result, measure, train
from tarflow.train.processes import Ranks, pick_device
from tarflow.train.recipe import LOWEST_RATE, Recipe, Run
from tarflow.train.trainer import Trainer

from .conftest import Cli, python, refused, said

TINY = Config(image_size=8, channels=1, patch_size=4, width=64, blocks=2, layers=1, classes=10, noise_std=0.1)
RECIPE = Recipe(steps=12, batch_size=8, warmup=2, lr=2e-3, seed=5)
BRIEF = dataclasses.replace(RECIPE, steps=2)
NAME = "digits_model_4_64_2_1_0.10"


def run(out: Path, **options: Any) -> Run:
    settings: dict[str, Any] = {"log_every": 4, "evaluate_every": 12, "sample_every": 0, "save_every": 6}
    return Run(out, **(settings | options))


def finish(out: Path, recipe: Recipe = RECIPE, config: Config = TINY, **options: Any) -> Result:
    result = train(config, digits(), recipe, run(out, **options))
    assert result is not None
    return result


def a_trainer(out: Path, recipe: Recipe = RECIPE, config: Config = TINY) -> Trainer:
    return Trainer(config, digits(), recipe, run(out), Ranks())


def steps_logged(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_schedule_warms_up_then_follows_a_cosine() -> None:
    rates = [Recipe(steps=110, warmup=10, lr=1e-2).learning_rate(step) for step in (0, 9, 10, 60, 110)]
    assert rates == pytest.approx([1e-3, 1e-2, 1e-2, (1e-2 + LOWEST_RATE) / 2, LOWEST_RATE])


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("batch_size", 0), ("lr", 0.0), ("lr", float("nan")), ("drop_label", 1.5), ("ema", 1.0)],
)
def test_recipe_refuses_numbers_that_train_nothing(field: str, value: float) -> None:
    numbers: dict[str, Any] = {"steps": 1, field: value}
    with pytest.raises(InputError, match=f"`{field}` is") as caught:
        Recipe(**numbers)
    assert caught.value.exit_code == 2


def test_average_follows_the_weights(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path, dataclasses.replace(RECIPE, ema=0.5))
    before = trainer.average.blocks[0].proj_in.weight.clone()
    trainer.advance()
    after = trainer.model.blocks[0].proj_in.weight.detach()
    torch.testing.assert_close(trainer.average.blocks[0].proj_in.weight, 0.1 * before + 0.9 * after)
    assert trainer.recipe.decay(1000) == 0.5


def test_loss_falls_and_the_average_is_what_is_saved(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    recipe = dataclasses.replace(RECIPE, steps=60, batch_size=32, lr=5e-3)
    data = digits()
    result = train(TINY, data, recipe, run(tmp_path, log_every=10, sample_every=60, samples=20), records.append)
    assert result is not None
    assert records[-1]["loss"] < records[0]["loss"] - 0.2
    assert records[-1]["seconds_left"] == 0
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == records
    assert (tmp_path / "samples_0000060.png").is_file()

    pth, safe = (checkpoint.load(tmp_path / (NAME + suffix)) for suffix in (".pth", ".safetensors"))
    assert pth.config == safe.config == TINY
    average = torch.load(tmp_path / "state.pt", weights_only=True)["average"]
    for name, tensor in pth.state_dict().items():
        assert torch.equal(tensor, safe.state_dict()[name])
        assert torch.equal(tensor, average[name])
    measured = measure(safe, data.held_out, result.held_out_draws)  # of other memory: sums may round otherwise
    assert result.held_out_bits_per_dim == pytest.approx(measured, abs=1e-6)
    assert result.held_out_bits_per_dim == pytest.approx(records[-1]["held_out_bits_per_dim"], abs=0.1)
    assert all(path.is_file() for path in result.files)
    assert set(result.files) == {path for path in tmp_path.iterdir() if not path.match("samples_*.png")}
    with pytest.raises(
        CheckpointError, match=rf"state that training resumes from.* beside it, '.*{re.escape(NAME)}\.pth'"
    ):
        checkpoint.load(tmp_path / "state.pt")


@pytest.mark.parametrize(("stop_at", "number"), [(4, signal.SIGINT), (8, signal.SIGHUP)])
def test_interrupted_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, stop_at: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(record: dict[str, Any]) -> None:
        if record["step"] == stop_at:
            signal.raise_signal(number)

    monkeypatch.setattr("tarflow.train.processes.ending", lambda: (signal.SIGTERM, signal.SIGHUP))  # nohup or not
    finish(tmp_path / "whole")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, digits(), RECIPE, run(tmp_path / "halves"), interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.load(tmp_path / "halves" / "state.pt", weights_only=True)["step"] == stop_at
    with (tmp_path / "halves" / "log.jsonl").open("a") as log:
        log.write('{"step": 11}\n{"st')  # what a run killed later, in the middle of a line, leaves behind
    finish(tmp_path / "halves", resume=True)

    whole, halves = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "halves"))
    assert whole["step"] == halves["step"] == 12
    assert whole.pop("identity") == halves.pop("identity")
    torch.testing.assert_close(halves, whole, rtol=0, atol=0)
    assert steps_logged(tmp_path / "halves") == steps_logged(tmp_path / "whole") == [4, 8, 12]


@pytest.mark.parametrize("renames", [4, 5])
def test_a_run_killed_inside_a_save_is_whole_when_resumed(renames: int, tmp_path: Path) -> None:
    """Each save renames three files; the run is killed inside its second and last."""
    script = f"""if True:
        import itertools, os, sys
        from tests.test_train import BRIEF, Path, finish
        renamed = itertools.count(1)
        sys.addaudithook(lambda event, _: event == "os.rename" and next(renamed) > {renames} and os._exit(9))
        finish(Path({str(tmp_path / "killed")!r}), BRIEF, save_every=1)"""
    assert python("-c", script, cwd=Path(__file__).parent.parent).returncode == 9
    whole, resumed = finish(tmp_path / "whole", BRIEF), finish(tmp_path / "killed", BRIEF, resume=True)
    assert [path.name for path in resumed.files] == [path.name for path in whole.files]
    for ours, theirs in zip(resumed.files[:2], whole.files[:2], strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_line_of_the_log_is_whole_or_not_there(tmp_path: Path) -> None:
    loop.append(tmp_path / "log", "a line\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(MachineError, match="disk is full"):
            loop.append(tmp_path / "log", "one too many\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "log").read_text() == "a line\n"


def test_a_finished_run_can_be_resumed_and_says_the_same(tmp_path: Path) -> None:
    first, again = finish(tmp_path), finish(tmp_path, resume=True)
    assert dataclasses.replace(first, seconds=0) == dataclasses.replace(again, seconds=0)


def test_what_a_resumed_run_has_in_common_is_named_as_ever(tmp_path: Path) -> None:
    """A name that changes makes every run begun before another run."""
    recipe = "steps batch_size lr warmup weight_decay drop_label ema grad_clip flip jitter seed"
    config = "image_size channels patch_size width blocks layers classes nvp noise_std head_dim"
    assert [*a_trainer(tmp_path).identity()] == [*recipe.split(), *config.split(), "data"]


def refuses(words: str, out: Path, recipe: Recipe = RECIPE, config: Config = TINY, **options: Any) -> None:
    with pytest.raises(InputError, match=words):
        finish(out, recipe, config, **options)


def test_runs_are_not_lost_or_mixed_up(tmp_path: Path) -> None:
    refuses("leave out `resume`", tmp_path, resume=True)
    finish(tmp_path)
    refuses("already holds a run", tmp_path)
    refuses("choose one", tmp_path, resume=True, force=True)
    faster, deeper = dataclasses.replace(RECIPE, lr=0.1), dataclasses.replace(TINY, layers=2)
    refuses(r"(?s)another run.*layers was 1, now 2.*lr was 0.002, now 0.1", tmp_path, faster, deeper, resume=True)
    finish(tmp_path, dataclasses.replace(RECIPE, steps=4), force=True)
    assert steps_logged(tmp_path) == [4]
    (tmp_path / "state.pt").write_bytes(b"nonsense")
    refuses("damaged", tmp_path, resume=True)
    refuses("is a file", tmp_path / "state.pt")


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    refuses("has 1498 images", tmp_path, dataclasses.replace(RECIPE, batch_size=1499))
    larger, finer = dataclasses.replace(TINY, image_size=16), dataclasses.replace(TINY, noise_std=0.125)
    refuses(r"\(16, 1, 10\); 'digits' has \(8, 1, 10\)", tmp_path, config=larger)
    refuses("two decimals", tmp_path, config=finer)
    with pytest.raises(InputError, match="`device` is 'tpu'"):
        pick_device("tpu")


def test_divergence_stops_before_anything_is_overwritten(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path)
    trainer.run.prepare(writes=True)
    trainer.advance()
    trainer.save()
    with torch.no_grad():
        trainer.model.blocks[0].proj_in.weight.fill_(float("nan"))
    trainer.advance()
    with pytest.raises(InputError, match="no longer finite at step 2"):
        trainer.save()
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 1
    assert not list(tmp_path.glob(".*")), "half-written files"


def test_volume_preserving_models_learn_their_prior(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, nvp=False, noise_std=None)
    recipe = dataclasses.replace(RECIPE, steps=40, ema=0.0)
    trainer = a_trainer(tmp_path, recipe, config)
    for _ in range(40):
        trainer.advance()
    images, labels = trainer.stream.batch(0, 256, torch.device("cpu"))
    with torch.no_grad():
        z, log_det = trainer.average.encode(images, labels)
    torch.testing.assert_close(trainer.average.prior, z.square().mean(0), rtol=0.6, atol=0.05)
    assert not log_det.any()
    trainer.save()
    assert checkpoint.load(tmp_path / "digits_model_4_64_2_1_uniform.pth").config == config


def test_measure_is_a_seeded_mean_over_all_images(tmp_path: Path) -> None:
    data = digits()
    model = a_trainer(tmp_path).average
    at_once, in_parts = (measure(model, data.held_out, 2, batch_size=size) for size in (299, 100))
    assert at_once == pytest.approx(in_parts, abs=1e-5)
    assert at_once != measure(model, data.held_out, 2, seed=1)


VOLUME_PRESERVING, LONG = dataclasses.replace(TINY, nvp=False), dataclasses.replace(RECIPE, steps=30)


def one_of_two(out: Path) -> None:
    """What each of two processes does: trains until the last of them is told to stop, and goes on from there."""

    class Told(Trainer):
        def advance(self) -> torch.Tensor:
            if self.step == 9 and self.ranks.rank == 1 and not self.run.resume:
                signal.raise_signal(signal.SIGTERM)
            loss = super().advance()
            if self.step == 30:
                torch.save(self.model.state_dict(), out / f"rank{self.ranks.rank}.pt")
            return loss

    patch = pytest.MonkeyPatch()
    patch.setattr(loop, "Trainer", Told)
    patch.setattr(Ranks, "leave", lambda ranks: None)  # one group for both runs: torchrun's store serves no second
    how = {"log_every": 10, "evaluate_every": 30, "save_every": 30}
    with pytest.raises(KeyboardInterrupt):
        train(VOLUME_PRESERVING, digits(), LONG, run(out, **how))
    torch.distributed.barrier()
    assert torch.load(out / "state.pt", weights_only=True)["step"] == 10
    result = train(VOLUME_PRESERVING, digits(), LONG, run(out, **how, resume=True))
    assert (result is None) == (os.environ["RANK"] == "1")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # what is tested is over; threads of torch can abort an interpreter that is being torn down


def test_two_processes_train_the_model_that_one_does(tmp_path: Path) -> None:
    """The same stream of examples, cut in two: 4 images on each of two ranks are the 8 of one.

    And a signal that only one of them gets stops both.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.test_train"]
    process = subprocess.Popen(
        [sys.executable, *launcher, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
        start_new_session=True,
    )
    try:
        assert process.wait(timeout=900) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    trainer = a_trainer(tmp_path, LONG, VOLUME_PRESERVING)
    losses = torch.stack([trainer.advance() for _ in range(30)])

    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, alone in trainer.model.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        if not name.endswith("qkv.bias"):  # a key's bias changes no softmax: its gradient is rounding alone
            assert (first[name] - alone).abs().max() < 1e-4, name
    logged = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged == pytest.approx(losses.view(3, 10).mean(1).tolist(), abs=1e-4)
    assert logged[-1] < logged[0]


SMALL = "--out run --patch-size 4 --width 64 --blocks 1 --layers 1 --steps 4 --batch-size 8 --device cpu"


def test_command_prints_one_json_document(tarflow: Cli) -> None:
    done = tarflow("train", *SMALL.split(), "--sample-every", 0, "--json", "--log-every", 2)
    document = said(done)
    assert document["steps"] == 4
    assert document["held_out_bits_per_dim"] > 0
    assert all(Path(file).is_file() for file in document["files"])
    assert "step 2/4" in done.stderr
    again = tarflow("train", *SMALL.split(), "--sample-every", 0, "--json", "--log-every", 2, "--force", "--quiet")
    assert said(again)["steps"] == 4
    assert "step" not in again.stderr


def test_command_says_what_a_user_can_mend(tarflow: Cli) -> None:
    for arguments, message in (
        ("--width 100", "--width is 100; expected a multiple of the head dimension, 64"),
        ("--patch-size 3", "--patch-size is 3; expected a divisor of the image size, 8"),
        ("--noise-std loud", "--noise-std is 'loud'; expected a number, or 'uniform'"),
        ("--data photos", "no folder at"),
        ("--threads 0", "--threads is 0"),
        ("--log-every 0", "--log-every is 0; expected 1 or more"),
    ):
        refused(tarflow("train", *SMALL.split(), *arguments.split()), 2, message)


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
