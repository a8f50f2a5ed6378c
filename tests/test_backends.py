"""What every way to run a bundle does alike: ONNX Runtime stepwise and resident, TensorRT on a double of the device
that executes the same graphs from the same addresses, the PyTorch twin, and libtarflow.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tarflow.runtime.backend import Branches
from tarflow.runtime.decode import serial
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.opening import Opening
from tarflow.runtime.request import UNGUIDED

from .backends import ALL, STEPS, Cancelled, Drawer, double_device, open_drawer, open_flow
from .conftest import Exported, Goldens, largest
from .device_double import build_double
from .test_golden import FORWARD, RUNS, SAMPLES, guidance_of

GUIDED = Guidance(1.5)


@pytest.fixture
def device(kind: str) -> Iterator[None]:
    """The double's device, for "tensorrt" alone."""
    with double_device() if kind == "tensorrt" else contextlib.nullcontext():
        yield


@pytest.fixture
def folder(kind: str, bundle: Exported, tmp_path: Path) -> Exported:
    """folder("cond", **engines): a bundle that this kind runs."""

    def find(case: str = "cond", **engines: Any) -> Path:
        if kind != "tensorrt":
            return bundle(case)
        if not (tmp_path / case).exists():
            shutil.copytree(bundle(case), tmp_path / case)
            build_double(tmp_path / case, **({"batch": (1, 8, 64)} | engines))
        return tmp_path / case

    return find


every = pytest.mark.parametrize("kind", ALL)
stepped = pytest.mark.parametrize("kind", STEPS)
of_graphs = pytest.mark.parametrize("kind", [kind for kind in STEPS if kind != "twin"])  # it only walks, and judges


@every
@pytest.mark.parametrize(("name", "run"), RUNS)
def test_samples_denoised_and_certificates_are_the_references(
    device: None, kind: str, folder: Exported, golden: Goldens, name: str, run: int
) -> None:
    case, drawer = golden(name), open_drawer(kind, folder(name))
    how: dict[str, Any] = {"noise": case.vectors["noise"], "labels": case.labels, "guidance": guidance_of(case, run)}
    raw = drawer.sample(**how, denoise=False, certify=True)
    assert largest(raw.images, case.raw(run)) < SAMPLES
    assert raw.certificate is not None
    assert raw.certificate.max() < 1e-4  # guided runs too: the forward graph guides the same way
    assert raw.log_prob is not None
    oracle = open_drawer("twin", folder(name)).sample(**how, certify=True).log_prob
    assert oracle is not None
    assert largest(raw.log_prob, oracle) < 1e-6 * raw.images[0].size  # nats, of the guided map where it is guided
    assert largest(drawer.sample(**how).images, case.vectors[f"sample{run}.denoised"]) < SAMPLES
    assert largest(drawer.denoise(case.raw(run), case.labels), case.vectors[f"sample{run}.denoised"]) < SAMPLES


@every
@pytest.mark.parametrize("name", ["cond", "uncond", "vp"])
def test_latents_are_the_references(device: None, kind: str, folder: Exported, golden: Goldens, name: str) -> None:
    case, drawer = golden(name), open_drawer(kind, folder(name))
    z, log_det = drawer.encode(case.vectors["images"], case.labels)
    assert largest(z, case.vectors["forward.z"]) < FORWARD
    assert largest(log_det, case.vectors["forward.logdet"]) < FORWARD
    if name == "cond":  # a dropped label is the null class
        z, log_det = drawer.encode(case.vectors["images"], case.vectors["forward_dropped.labels"])
        assert largest(z, case.vectors["forward_dropped.z"]) < FORWARD
        assert largest(log_det, case.vectors["forward_dropped.logdet"]) < FORWARD


@every
def test_samples_agree_across_batch_sizes_and_with_the_plainest_way(
    device: None, kind: str, folder: Exported, bundle: Exported
) -> None:
    drawer = open_drawer(kind, folder())
    how: dict[str, Any] = {"labels": np.arange(21) % 5, "guidance": GUIDED, "seed": 2**63 + 5, "first_sample": 2**40}
    expected = Flow.open(bundle("cond")).sample(21, **how)
    for size in (None, 1, 4, 16):
        found = drawer.sample(21, **how, batch_size=size)
        assert largest(found.images, expected) < 1e-5


@every
@pytest.mark.parametrize("threads", [1, 2])
def test_a_reproducible_sample_is_bitwise_the_same_whatever_n_batch_size_and_threads(
    device: None, kind: str, folder: Exported, threads: int
) -> None:
    labels = np.arange(40) % 5
    how: dict[str, Any] = {"guidance": GUIDED, "reproducible": True}
    whole = open_drawer(kind, folder()).sample(40, labels=labels, **how).images
    drawer = open_drawer(kind, folder(), Opening(threads=threads))
    for first, n, size in ((0, 40, None), (0, 1, 1), (7, 1, 64), (15, 3, None), (30, 10, 4)):
        part = drawer.sample(n, labels=labels[first : first + n], first_sample=first, batch_size=size, **how)
        assert np.array_equal(part.images, whole[first : first + n])


@every
def test_a_sample_that_overflows_leaves_no_trace_in_the_next_batch(device: None, kind: str, folder: Exported) -> None:
    drawer = open_drawer(kind, folder())
    noise = np.random.default_rng(0).normal(size=(3, 16, 12)).astype(np.float32)
    expected = drawer.sample(noise=noise, labels=0, denoise=False).images
    wild = noise.copy()
    wild[1] = 3e38
    broken = drawer.sample(noise=wild, labels=0, denoise=False).images
    assert not np.isfinite(broken[1]).all()
    assert largest(broken[[0, 2]], expected[[0, 2]]) < 1e-5
    assert largest(drawer.sample(noise=noise, labels=0, denoise=False).images, expected) < 1e-5


@every
def test_what_overflows_is_drawn_again_and_nothing_else(device: None, kind: str, folder: Exported) -> None:
    drawer, labels = open_drawer(kind, folder("demo")), np.arange(24) % 10
    how: dict[str, Any] = {"labels": labels, "guidance": Guidance(40.0), "denoise": False}
    plain = drawer.sample(24, **how).images
    broken = ~np.isfinite(plain).all((1, 2, 3))
    assert broken.any(), "guidance of 40 must overflow somewhere, or this test shows nothing"
    again = drawer.sample(24, **how, redraw_nonfinite=True).images
    assert np.array_equal(again[~broken], plain[~broken])
    assert (~np.isfinite(again).all((1, 2, 3))).sum() < broken.sum()


@every
def test_one_block_in_memory_gives_the_same_samples(device: None, kind: str, folder: Exported) -> None:
    drawer = open_drawer(kind, folder())
    small = open_drawer(kind, folder(), Opening("tensorrt" if kind == "tensorrt" else "cpu", memory="least"))
    for _ in range(2):  # the second finds what the first left
        found = small.sample(5, labels=1, guidance=GUIDED)
        assert np.array_equal(found.images, drawer.sample(5, labels=1, guidance=GUIDED).images)


@every
def test_several_threads_draw_what_one_draws(device: None, kind: str, folder: Exported) -> None:
    """Of one Flow, or of a handle a thread, which share what they opened."""
    drawer = open_drawer(kind, folder())

    def draw(by: Drawer, k: int) -> Any:
        return by.sample(6, labels=k, seed=k, guidance=GUIDED, reproducible=True).images

    def one_of_several(k: int) -> Any:
        return draw(open_drawer(kind, folder()) if kind.startswith("libtarflow") else drawer, k)

    expected = [draw(drawer, k) for k in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(np.array_equal, pool.map(one_of_several, range(4)), expected))


@every
def test_a_run_is_cancelled_at_a_step_and_the_next_one_is_right(device: None, kind: str, folder: Exported) -> None:
    drawer = open_drawer(kind, folder())
    expected = drawer.sample(3, labels=1).images
    steps: list[Any] = []

    def stop(progress: Any) -> None:
        steps.append(progress)
        if len(steps) == 20:
            raise Cancelled

    with pytest.raises(Cancelled):
        drawer.sample(3, labels=1, progress=stop)
    assert len(steps) == 20
    assert np.array_equal(drawer.sample(3, labels=1).images, expected)


# --- block by block -------------------------------------------------------------------------------------------------


@stepped
@pytest.mark.parametrize(
    ("name", "windows"), [("cond", [15]), ("cond", [4, 1, 7, 3]), ("uncond", [8, 7]), ("vp", [2, 1])]
)
def test_any_windows_over_the_true_patches_give_them_back(
    device: None, kind: str, folder: Exported, bundle: Exported, name: str, windows: list[int]
) -> None:
    flow, plainest = open_flow(kind, folder(name, window=(1, 8, 15))), Flow.open(bundle(name))
    labels = np.array([0, 1, -1]) if flow.config.classes else np.full(3, -1)
    tokens, plain = flow.config.tokens, Branches.plain(labels, flow.config.tokens)
    for block in range(flow.config.blocks):
        z = flow.noise(block, range(3))
        expected = serial(plainest.backend.decoding(block, z, plain), tokens)
        decoding = flow.backend.decoding(block, z, plain)
        decoding.guess(expected)
        position = 0
        for window in windows:
            decoding.step(position, window)
            position += window
        assert largest(decoding.patches(), expected) < 1e-5
        decoding.close()


@of_graphs
@pytest.mark.parametrize("guidance", [UNGUIDED, Guidance(1.0, "a", annealed=True)])
def test_decoding_in_parallel_is_decoding_serially(
    device: None, kind: str, folder: Exported, guidance: Guidance
) -> None:
    flow = open_flow(kind, folder("demo", window=(1, 8, 15)))
    how: dict[str, Any] = {"labels": np.array([3, 7, -1, 0, 9]), "guidance": guidance, "denoise": False}
    expected = flow.sample(5, **how)
    for n in (5, 1):
        how["labels"] = how["labels"][:n]
        assert largest(flow.sample(n, **how, decode="exact"), expected[:n]) < 1e-4
        assert largest(flow.sample(n, **how, decode="fast"), expected[:n]) < 0.02


@of_graphs
@pytest.mark.parametrize(("position", "window"), [(-1, 1), (15, 1), (16, 1), (8, 8), (0, 16), (3, 0)])
def test_a_window_out_of_bounds_is_refused_by_the_host(
    device: None, kind: str, folder: Exported, position: int, window: int
) -> None:
    flow = open_flow(kind, folder(window=(1, 8, 16)))
    decoding = flow.backend.decoding(0, flow.noise(0, range(2)), Branches.plain(np.array([0, 1]), 16))
    with pytest.raises(IndexError, match="has no next patch in 16"):
        decoding.step(position, window)


@of_graphs
@pytest.mark.parametrize("name", ["cond", "uncond", "vp"])
def test_every_block_forward_and_backward_is_the_models(
    device: None, kind: str, folder: Exported, bundle: Exported, name: str
) -> None:
    """Whose gradient is autograd's, and whose guided forward pass inverts guided decoding step by step."""
    flow, model = open_flow(kind, folder(name)), open_flow("twin", bundle(name))
    rng, tokens = np.random.default_rng(0), flow.config.tokens
    x, grad_z = (rng.normal(size=(3, tokens, flow.config.patch_dim)).astype(np.float32) for _ in range(2))
    labels = np.array([0, -1, 2]) if flow.config.classes else np.full(3, -1)
    guided = Guidance(0.8, "ab", True, 0.7).branches(tokens, labels)
    for block in range(flow.config.blocks):
        for branches in (Branches.plain(labels, tokens), guided):
            for found, expected in zip(*(by.backend.forward(block, x, branches) for by in (flow, model)), strict=True):
                assert largest(found, expected) < 1e-5
        found, expected = (by.backend.gradient(block, x, labels, grad_z, x[:, 0, 0]) for by in (flow, model))
        assert largest(found, expected) < 1e-5
