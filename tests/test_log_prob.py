"""The log-density of every certified sample is that of the flow it was drawn from, guided or not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tarflow import Flow, Guidance
from tarflow.checkpoint import load

from .conftest import DEMO, Exported, Goldens

NATS = 1e-6  # per dimension, between what must be the same number


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of PyTorch's: many small steps take longer when two wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_jacobian(checkpoint: Path, noise: Any, label: int | None, guidance: Guidance) -> float:
    """The log-density of what one noise (1, T, D) decodes to: by differences of decoding, in float64."""
    model = load(checkpoint).double()
    z = torch.from_numpy(noise.astype(np.float64))
    count, step = z.numel(), 1e-7
    moved = z.reshape(1, -1) + step * torch.cat([torch.zeros(1, count), torch.eye(count)]).double()
    labels = None if label is None else torch.full((len(moved),), label)
    how = guidance.scale, guidance.what, guidance.annealed, guidance.attention_temperature
    images = model.decode(moved.view(-1, *z.shape[1:]), labels, *how).reshape(-1, count)
    jacobian = (images[1:] - images[0]) / step
    log_normal = -0.5 * float(z.square().sum()) - 0.5 * count * math.log(2 * math.pi)
    return log_normal - float(torch.linalg.slogdet(jacobian)[1])


@pytest.mark.parametrize(
    ("name", "label", "guidance"),
    [
        ("demo", 3, Guidance(1.5, annealed=True, attention_temperature=0.7)),
        ("demo", 1, Guidance(1.0, "a")),
        ("demo", 2, Guidance(1.0, "b")),
        ("uncond", None, Guidance(0.6, attention_temperature=1.5, annealed=True)),
        ("vp", 1, Guidance(1.0)),
    ],
)
def test_it_is_what_a_numerical_jacobian_of_decoding_says(
    one_thread: None, bundle: Exported, golden: Goldens, name: str, label: int | None, guidance: Guidance
) -> None:
    flow = Flow.open(bundle(name))
    noise = flow.noise(3, range(2))
    drawn = flow.sample(noise=noise, labels=label, guidance=guidance, certify=True)
    assert drawn.log_prob.dtype == np.float64
    checkpoint = DEMO if name == "demo" else golden(name).checkpoint
    expected = by_jacobian(checkpoint, noise[1:], label, guidance)
    assert abs(drawn.log_prob[1] - expected) < NATS * noise[0].size


@pytest.mark.parametrize("name", ["cond", "uncond"])
def test_unguided_it_is_the_likelihood_of_the_raw_sample(bundle: Exported, name: str) -> None:
    flow = Flow.open(bundle(name))
    labels = np.arange(20) % 5 if name == "cond" else None
    raw = flow.sample(20, labels=labels, seed=5, denoise=False, certify=True)
    likely = flow.log_likelihood(raw, labels)
    assert np.abs(raw.log_prob - likely).max() < NATS * raw[0].size
    denoised = flow.sample(20, labels=labels, seed=5, certify=True)
    assert np.array_equal(denoised.log_prob, raw.log_prob), "of the raw sample, denoised or not"


def test_a_volume_preserving_model_counts_with_the_prior_it_is_sampled_from(bundle: Exported) -> None:
    flow = Flow.open(bundle("vp"))
    raw = flow.sample(4, labels=1, denoise=False, certify=True)
    z, deviation = flow.noise(0, range(4)).astype(np.float64), flow.deviation.astype(np.float64)
    expected = -(0.5 * z**2 + 0.5 * math.log(2 * math.pi) + np.log(deviation)).sum((1, 2))
    assert np.abs(raw.log_prob - expected).max() < NATS * raw[0].size
    assert np.abs(raw.log_prob - flow.log_likelihood(raw, 1)).max() > 0.1, "which counts with the unit prior"


def test_it_is_the_same_whoever_shares_the_batch(flow: Flow) -> None:
    how: dict[str, Any] = {"labels": 4, "guidance": 1.0, "certify": True}
    whole, part = flow.sample(9, **how), flow.sample(3, first_sample=5, batch_size=2, **how)
    assert np.abs(whole.log_prob[5:8] - part.log_prob).max() < 1e-3
    tiles = [flow.sample(n, first_sample=9 - n, reproducible=True, **how).log_prob for n in (9, 2)]
    assert np.array_equal(tiles[0][7:], tiles[1])


def test_a_sample_that_overflows_has_none_and_the_others_have(flow: Flow) -> None:
    drawn = flow.sample(24, labels=np.arange(24) % 10, guidance=40.0, denoise=False, certify=True)
    broken = np.isin(np.arange(24), drawn.report.nonfinite)
    assert 0 < broken.sum() < 24, "guidance of 40 must overflow somewhere, or this test shows nothing"
    assert not np.isfinite(drawn.log_prob[broken]).any()
    again = flow.sample(
        24, labels=np.arange(24) % 10, guidance=40.0, denoise=False, certify=True, redraw_nonfinite=True
    )
    assert np.isfinite(again.log_prob[broken]).sum() > 0, "the sample that was drawn again is the one that counts"


def test_the_report_says_of_what_it_is(bundle: Exported, demo: Path) -> None:
    flow = Flow.open(bundle("cond"))
    exact = "of the raw sample, exact under the bundle's fp32 graphs"
    assert flow.sample(1, certify=True).report.density == exact
    assert flow.sample(1, labels=1, guidance=1.0, certify=True).report.density == f"{exact}, guided"
    loose = flow.sample(1, certify=True, decode="fast").report.density
    assert loose == f"{exact}; decoded in parallel to 0.001: drawn from that density as nearly as the certificate says"
    native = Flow.open(demo, "native", precision="int8", threads=1).sample(1, certify=True)
    assert native.report.density.startswith(f"{exact}; decoded in int8: ")
    plain = flow.sample(1)
    assert (plain.log_prob, plain.certificate, plain.report.density) == (None, None, None)
