"""Numbers of the reference implementation, through PyTorch and through an exported bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tarflow.checkpoint import load
from tarflow.runtime.flow import Guidance

from .conftest import Cli, Exported, Golden, Goldens, largest, said

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


def test_the_command_line_gives_the_reference_numbers(
    golden: Goldens, bundle: Exported, cli: Cli, tmp_path: Path
) -> None:
    case, folder = golden("cond"), bundle("cond")
    assert case.labels is not None
    for name, array in (("z", case.vectors["noise"]), ("y", case.labels), ("x", case.vectors["images"])):
        np.save(tmp_path / f"{name}.npy", array)
    options = "--noise z.npy --guidance 1.2 --attention-temperature 0.7 --annealed --labels y.npy --save s.npy --json"
    for more, expected in ((["--no-denoise"], case.raw(5)), ([], case.vectors["sample5.denoised"])):
        made = said(cli("generate", folder, *options.split(), *more, cwd=tmp_path))
        assert made["certificate"]["max"] < 1e-4
        samples = np.load(tmp_path / "s.npy")
        assert samples.dtype == np.float32
        assert largest(samples, expected) < SAMPLES
    made = said(cli("likelihood", folder, "x.npy", "--labels", "y.npy", "--save", "l.npz", "--json", cwd=tmp_path))
    latent, z, log_det = np.load(tmp_path / "l.npz"), case.vectors["forward.z"], case.vectors["forward.logdet"]
    assert largest(latent["z"], z) < FORWARD
    assert largest(latent["log_det"], log_det) < FORWARD
    assert np.array_equal(latent["logdet"], latent["log_det"])
    bits = ((0.5 * z**2 + 0.5 * np.log(2 * np.pi) + np.log(128)).mean((1, 2)) - log_det) / np.log(2)
    assert largest(np.array(made["bits_per_dim"]), bits) < 1e-4
