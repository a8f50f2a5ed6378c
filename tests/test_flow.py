"""What a Flow promises: the same sample whoever draws it, honest reports, nothing silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tarflow.runtime.backend import Branches
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.errors import InputError, MachineError
from tarflow.runtime.flow import Flow, Guidance, Preview, Progress
from tarflow.runtime.image import patchify
from tarflow.runtime.opening import Opening
from tarflow.runtime.request import Request

from .conftest import Golden, largest

GUIDED = Guidance(1.5)


@pytest.fixture(scope="module")
def flow(bundle: Callable[..., Path]) -> Flow:
    return Flow.open(bundle("cond"))


def test_a_report_names_the_level_that_holds(flow: Flow) -> None:
    levels = [flow.sample(2, labels=1, reproducible=on).report for on in (False, True)]
    assert [report.level[:2] for report in levels if report is not None] == ["L2", "L1"]


def test_with_the_least_memory_one_block_is_open_at_a_time(bundle: Callable[..., Path]) -> None:
    small = Flow.open(bundle("cond"), memory="least")
    small.sample(5, labels=1)
    assert len({key[0] for key in small.backend.sessions._open}) == 1  # type: ignore[attr-defined]


def test_a_request_is_checked_once_and_its_parts_are_not(flow: Flow) -> None:
    """Guidance works on some of these samples: a part in which it does nothing is drawn with the rest's guidance."""
    request = Request(6, labels=(1, -1), guidance=GUIDED, seed=3).resolved(flow.config)
    whole = flow.draw(request)
    parts = [flow.draw(request.part(first, 1)) for first in range(6)]
    assert largest(np.concatenate(parts), whole) < 1e-5
    assert largest(whole, flow.sample(6, labels=[1, -1] * 3, guidance=GUIDED, seed=3)) == 0
    assert request.part(3, 3).classes().tolist() == [-1, 1, -1]
    with pytest.raises(InputError, match="does nothing"):
        Request(2, labels=(-1,), guidance=GUIDED).resolved(flow.config)


def test_an_opening_may_be_given_whole(bundle: Callable[..., Path]) -> None:
    assert Flow.open(bundle("cond"), Opening(threads=1)).backend.machine.endswith("1 threads")
    with pytest.raises(InputError, match="drop `threads`"):
        Flow.open(bundle("cond"), Opening(), threads=2)
    for wrong in ({"threads": 0}, {"memory": "little"}, {"memory": 0}, {"provider": "ort-tensorrt"}):
        with pytest.raises(InputError, match=f"`{next(iter(wrong))}`"):
            Flow.open(bundle("cond"), **wrong)


def test_an_unguided_certificate_and_the_gradient_share_one_encoding(
    bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = Flow.open(bundle("cond"))
    expected = flow.sample(3, labels=1)
    encoded: list[int] = []
    forward = flow.backend.forward

    def counting(block: int, *inputs: Any) -> tuple[Any, Any]:
        encoded.append(block)
        return forward(block, *inputs)

    monkeypatch.setattr(flow.backend, "forward", counting)
    assert np.array_equal(flow.sample(3, labels=1, certify=True), expected)
    assert encoded == list(range(flow.config.blocks))
    flow.sample(3, labels=1, certify=True, guidance=GUIDED)
    assert len(encoded) == 3 * flow.config.blocks


def test_a_label_below_zero_and_no_label_are_the_null_class(flow: Flow) -> None:
    assert np.array_equal(flow.sample(3, labels=-1), flow.sample(3))
    assert largest(flow.sample(3, labels=2), flow.sample(3)) > 1e-3


def test_given_noise_gives_the_sample_its_seed_gives(flow: Flow) -> None:
    noise = flow.noise(5, range(10, 14))
    assert np.array_equal(flow.sample(noise=noise, labels=1), flow.sample(4, labels=1, seed=5, first_sample=10))


def test_the_certificate_of_the_demo_is_small_and_costs_little(demo: Path) -> None:
    samples = Flow.open(demo).sample(32, labels=np.arange(32) % 10, guidance=Guidance(1.0), certify=True)
    assert samples.report is not None
    assert samples.report.certificate is not None
    assert samples.report.certificate.shape == (32,)
    assert samples.report.certificate.max() < 1e-4
    assert samples.report.certificate_seconds < samples.report.seconds


def test_a_wrong_sample_does_not_pass_its_certificate(flow: Flow) -> None:
    noise = flow.noise(0, range(3))
    x = flow.sample(noise=noise, labels=1, denoise=False)
    latent, _ = flow.encode(np.asarray(x) + np.float32(0.01), 1)
    assert largest(latent, noise) > 1e-3


def test_samples_that_overflow_are_named_and_only_those_redrawn(demo: Path) -> None:
    flow = Flow.open(demo)
    wild, labels = Guidance(40.0), np.arange(24) % 10
    plain = flow.sample(24, labels=labels, guidance=wild, denoise=False)
    assert plain.report is not None
    assert plain.report.nonfinite, "guidance of 40 must overflow somewhere, or this test shows nothing"
    good = [i for i in range(24) if i not in plain.report.nonfinite]
    assert np.isfinite(np.asarray(plain)[good]).all()
    again = flow.sample(24, labels=labels, guidance=wild, denoise=False, redraw_nonfinite=True)
    assert again.report is not None
    assert set(again.report.redrawn) == set(plain.report.nonfinite)
    assert np.array_equal(np.asarray(again)[good], np.asarray(plain)[good])
    assert set(again.report.nonfinite) < set(plain.report.nonfinite) or not again.report.nonfinite


def test_progress_counts_every_step_and_can_cancel(flow: Flow) -> None:
    seen: list[Progress] = []
    flow.sample(10, labels=1, batch_size=5, progress=seen.append)
    assert [p.done for p in seen] == list(range(1, seen[-1].total + 1))
    assert seen[-1].total == 2 * 4 * 15

    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.done == 3:
            raise Stop

    with pytest.raises(Stop):
        flow.sample(2, labels=1, progress=stop)


def test_preview_shows_every_tile_after_every_block_and_the_last_is_the_raw_sample(flow: Flow) -> None:
    seen: list[Preview] = []
    drawn = flow.sample(
        5, labels=1, first_sample=14, guidance=GUIDED, reproducible=True, denoise=False, preview=seen.append
    )
    assert [p.block for p in seen] == [3, 2, 1, 0] * 2
    assert [p.first for p in seen] == [14] * 4 + [16] * 4
    assert [len(p.images) for p in seen] == [2] * 4 + [3] * 4
    assert drawn.report is not None
    assert 0 < sum(p.seconds for p in seen) < drawn.report.seconds
    assert np.array_equal(np.concatenate([p.images for p in seen if p.block == 0]), drawn)
    denoised = flow.sample(5, labels=1, first_sample=14, guidance=GUIDED, reproducible=True, preview=seen.append)
    assert not np.array_equal(denoised, drawn)
    assert np.array_equal(seen[-1].images, seen[7].images), "what is shown is never denoised"


def test_a_preview_inverts_the_blocks_one_by_one(flow: Flow) -> None:
    """Encoding what is seen after a block with that block alone gives what was seen before it."""
    seen: list[Preview] = []
    flow.sample(3, labels=2, preview=seen.append)
    plain = Branches.plain(np.full(3, 2), flow.config.tokens)
    for before, after in pairwise(seen):
        found, _ = flow.backend.forward(after.block, patchify(after.images, flow.config.patch_size), plain)
        assert largest(found, patchify(before.images, flow.config.patch_size)) < 1e-4


def test_a_preview_can_cancel(flow: Flow) -> None:
    class Stop(Exception):
        pass

    def stop(preview: Preview) -> None:
        blocks.append(preview.block)
        if preview.block == 2:
            raise Stop

    blocks: list[int] = []
    with pytest.raises(Stop):
        flow.sample(2, labels=1, preview=stop)
    assert blocks == [3, 2]


def test_likelihood_is_the_formula_of_the_paper(golden: Callable[[str], Golden], flow: Flow) -> None:
    case = golden("cond")
    z, log_det = case.vectors["forward.z"].astype(np.float64), case.vectors["forward.logdet"]
    nats = (log_det - (0.5 * z**2 + 0.5 * np.log(2 * np.pi)).mean((1, 2))) * z[0].size
    assert largest(flow.log_likelihood(case.vectors["images"], case.labels), nats) < 1e-2
    bits = (np.log(128) - nats / z[0].size) / np.log(2)
    assert largest(flow.bits_per_dim(case.vectors["images"], case.labels), bits) < 1e-5


def test_eight_bit_images_get_the_noise_of_training(flow: Flow) -> None:
    images = np.random.default_rng(0).integers(0, 256, (200, 3, 8, 8)).astype(np.uint8)
    noisy = flow.dequantise(images, seed=3)
    assert abs((noisy - (images / 127.5 - 1)).std() - 0.07) < 1e-3
    assert np.array_equal(noisy[5:9], flow.dequantise(images[5:9], seed=3, first_sample=5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "`n` is 0"),
        ({"n": -3}, "`n` is -3"),
        ({}, "nothing to draw"),
        ({"n": 2, "labels": 5}, "classes 0 to 4"),
        ({"n": 2, "labels": [1, 2, 3]}, "shape"),
        ({"n": 2, "labels": 1.5}, "integers"),
        ({"noise": np.zeros((2, 16, 11))}, "shape"),
        ({"noise": np.full((2, 16, 12), np.nan)}, "not finite"),
        ({"noise": np.zeros((0, 16, 12))}, "shape"),
        ({"n": 3, "noise": np.zeros((2, 16, 12))}, "drop one"),
        ({"n": 2, "guidance": Guidance(1.0)}, "does nothing"),
        ({"n": 2, "batch_size": 0}, "`batch_size` is 0"),
        ({"n": 2, "seed": -1}, "`seed` is -1"),
        ({"n": 2, "first_sample": -1}, "`first_sample` is -1"),
        ({"n": 2, "denoise": -1.0}, "strength"),
        ({"noise": np.zeros((2, 16, 12)), "redraw_nonfinite": True}, "redrawn"),
    ],
)
def test_what_cannot_be_meant_is_refused(flow: Flow, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        flow.sample(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"scale": -1}, {"scale": float("nan")}, {"what": "c"}, {"attention_temperature": 0}])
def test_guidance_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Guidance(**wrong)  # type: ignore[arg-type]


def test_guidance_of_an_unconditional_model_needs_a_temperature(bundle: Callable[..., Path]) -> None:
    flow = Flow.open(bundle("uncond"))
    with pytest.raises(InputError, match="does nothing"):
        flow.sample(2, guidance=Guidance(1.0))
    assert largest(flow.sample(2, guidance=Guidance(1.0, attention_temperature=0.5)), flow.sample(2)) > 1e-4
    with pytest.raises(InputError, match="unconditional"):
        flow.sample(2, labels=0)


def test_a_provider_that_is_not_here_is_an_error_that_says_what_to_install(bundle: Callable[..., Path]) -> None:
    with pytest.raises(MachineError, match="onnxruntime-gpu"):
        Flow.open(bundle("cond"), provider="cuda")
    with pytest.raises(InputError, match="`provider` is 'abacus'"):
        Flow.open(bundle("cond"), provider="abacus")
    assert "CPU" in Flow.open(bundle("cond"), provider="auto").backend.description


def test_an_opened_bundle_can_be_passed_on(bundle: Callable[..., Path]) -> None:
    opened = Bundle.open(bundle("cond"))
    assert np.array_equal(Flow.open(opened).sample(2), Flow.open(bundle("cond")).sample(2))
