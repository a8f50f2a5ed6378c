"""Numbers of the reference implementation, through PyTorch and through an exported bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tarflow.checkpoint import load
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.image import patchify

from .conftest import Cli, Exported, Golden, Goldens, largest

FORWARD, SAMPLES = 2e-5, 1e-4
RUNS = [("cond", i) for i in range(6)] + [("uncond", i) for i in range(3)] + [("vp", i) for i in range(2)]


def guidance_of(case: Golden, run: int) -> Guidance:
    said = case.case["samples"][run]
    return Guidance(
        said.get("guidance", 0.0), said.get("guide_what", "ab"), said.get("annealed", False), said.get("attn_temp", 1.0)
    )


@pytest.mark.parametrize("name", ["cond", "uncond", "vp"])
def test_pytorch_encodes_as_the_reference_block_by_block(golden: Goldens, name: str) -> None:
    case = golden(name)
    model = load(case.checkpoint)
    x = model.patchify(torch.from_numpy(case.vectors["images"]))
    labels = None if case.labels is None else torch.from_numpy(case.labels)
    with torch.no_grad():
        for k, block in enumerate(model.blocks):
            x, _ = block.encode(x, labels)
            assert largest(x.numpy(), case.vectors[f"forward.block{k}"]) < FORWARD
        z, log_det = model.encode(torch.from_numpy(case.vectors["images"]), labels)
    assert largest(z.numpy(), case.vectors["forward.z"]) < FORWARD
    assert largest(log_det.numpy(), case.vectors["forward.logdet"]) < FORWARD


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_pytorch_decodes_and_denoises_as_the_reference(golden: Goldens, name: str, run: int) -> None:
    case = golden(name)
    model = load(case.checkpoint)
    labels = None if case.labels is None else torch.from_numpy(case.labels)
    g = guidance_of(case, run)
    images = model.decode(
        torch.from_numpy(case.vectors["noise"]), labels, g.scale, g.what, g.annealed, g.attention_temperature
    )
    assert largest(images.numpy(), case.raw(run)) < SAMPLES
    denoised = model.denoise(torch.from_numpy(case.raw(run)), labels)
    assert largest(denoised.numpy(), case.vectors[f"sample{run}.denoised"]) < SAMPLES


def test_every_block_of_the_inverse_passes_through_the_reference_images(golden: Goldens, bundle: Exported) -> None:
    from tarflow.runtime.backend import Branches
    from tarflow.runtime.decode import serial

    case, flow = golden("cond"), Flow.open(bundle("cond"))
    assert case.labels is not None
    x, branches = case.vectors["noise"], Branches.plain(case.labels, flow.config.tokens)
    for k, block in enumerate(reversed(range(flow.config.blocks))):
        x = serial(flow.backend.decoding(block, x, branches), flow.config.tokens)
        assert largest(x, patchify(case.vectors[f"sample0.seq{k + 1}"], flow.config.patch_size)) < SAMPLES


def test_the_command_line_gives_the_reference_numbers(
    golden: Goldens, bundle: Exported, cli: Cli, tmp_path: Path
) -> None:
    case, folder = golden("cond"), bundle("cond")
    assert case.labels is not None
    np.save(tmp_path / "z.npy", case.vectors["noise"])
    np.save(tmp_path / "y.npy", case.labels)
    np.save(tmp_path / "x.npy", case.vectors["images"])
    options = ["--guidance", 1.2, "--attention-temperature", 0.7, "--annealed", "--labels", tmp_path / "y.npy"]
    for run, more in ((5, ["--no-denoise"]), (5, [])):
        made = cli(
            "generate", folder, "--noise", tmp_path / "z.npy", *options, *more, "--save", tmp_path / "s.npy", "--json"
        )
        assert made.returncode == 0, made.stderr
        assert json.loads(made.stdout)["certificate"]["max"] < 1e-4
        expected = case.raw(run) if more else case.vectors[f"sample{run}.denoised"]
        samples = np.load(tmp_path / "s.npy")
        assert samples.dtype == np.float32
        assert largest(samples, expected) < SAMPLES
    made = cli(
        "likelihood", folder, tmp_path / "x.npy", "--labels", tmp_path / "y.npy", "--save", tmp_path / "l.npz", "--json"
    )
    assert made.returncode == 0, made.stderr
    latent = np.load(tmp_path / "l.npz")
    assert largest(latent["z"], case.vectors["forward.z"]) < FORWARD
    assert largest(latent["logdet"], case.vectors["forward.logdet"]) < FORWARD
    z, log_det = case.vectors["forward.z"], case.vectors["forward.logdet"]
    bits = ((0.5 * z**2 + 0.5 * np.log(2 * np.pi) + np.log(128)).mean((1, 2)) - log_det) / np.log(2)
    assert largest(np.array(json.loads(made.stdout)["bits_per_dim"]), bits) < 1e-4
