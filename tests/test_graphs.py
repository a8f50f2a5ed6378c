"""The three graphs of a block against the model, autograd, and each other, before they are traced."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tarflow.config import Config
from tarflow.export.gradient import Gradient
from tarflow.export.graphs import Forward, Step
from tarflow.model import TarFlow, guidance_mix
from tarflow.reference import Twin
from tarflow.runtime.backend import Branches

BASE = Config(image_size=8, channels=3, patch_size=2, width=128, blocks=2, layers=2, classes=4, noise_std=0.1)
CONFIGS = [BASE, replace(BASE, classes=0), replace(BASE, nvp=False)]


def random_model(config: Config) -> TarFlow:
    """Random weights everywhere: at its zero start the output layer would make every comparison vacuous."""
    torch.manual_seed(0)
    model = TarFlow(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() == 1 else 0.7 * parameter.shape[-1] ** -0.5)
    for block in model.blocks:  # scales near one: guided dynamics overflow easily
        torch.nn.init.normal_(block.proj_out.weight, std=0.2 * config.width**-0.5)
        torch.nn.init.normal_(block.proj_out.bias, std=0.1)
    return model.eval()


@pytest.fixture(params=range(len(CONFIGS)), ids=["conditional", "unconditional", "volume-preserving"])
def model(request: pytest.FixtureRequest) -> TarFlow:
    return random_model(CONFIGS[request.param])


def labels_of(model: TarFlow, batch: int) -> torch.Tensor:
    return torch.tensor([0, -1, 3, 1, 2][:batch]) if model.config.classes else torch.full((batch,), -1)


def for_graph(model: TarFlow, labels: torch.Tensor) -> torch.Tensor:
    """Graphs count the null class as one more class."""
    return torch.where(labels < 0, model.config.classes, labels)


@pytest.mark.parametrize("k", [0, 1])
def test_forward_is_the_model_and_gradient_is_autograd(model: TarFlow, k: int) -> None:
    block, labels = model.blocks[k], labels_of(model, 3)
    x = torch.randn(3, model.config.tokens, model.config.patch_dim, requires_grad=True)
    grad_z, grad_log_det = torch.randn_like(x), torch.randn(3)
    z, log_det = block.encode(x, labels)
    (expected,) = torch.autograd.grad((z * grad_z).sum() + (log_det * grad_log_det).sum(), x)
    with torch.no_grad():
        mix = torch.ones(2, 1, model.config.tokens)
        found_z, found_log_det = Forward(block)(x, for_graph(model, labels)[None], mix, torch.ones(1))
        found = Gradient(block)(x, for_graph(model, labels)[None], grad_z, grad_log_det)
    torch.testing.assert_close(found_z, z, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found_log_det, log_det, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def walk(
    model: TarFlow, k: int, z: torch.Tensor, x: torch.Tensor, labels: torch.Tensor, windows: list[int]
) -> torch.Tensor:
    """Step in windows that read the true x (z and x in block order); the cache is kept as a runtime keeps it."""
    block, config, batch = model.blocks[k], model.config, len(z)
    order = torch.arange(config.tokens).flip(0) if block.reversed else torch.arange(config.tokens)
    outputs = config.patch_dim * (2 if config.nvp else 1)
    cache = [torch.zeros(batch, config.heads, config.tokens, config.head_dim) for _ in range(2 * config.layers)]
    found, position = [x[:, :1]], 0
    for window in windows:
        end = position + window
        bias = torch.full((window, config.tokens + window), -1e30)
        bias[:, :position] = 0
        bias[:, config.tokens :] = torch.full((window, window), -1e30).triu(1)
        flat, fresh = Step(block)(
            x[:, position:end].reshape(-1, config.patch_dim),
            z[:, position + 1 : end + 1].reshape(-1, config.patch_dim),
            order[position:end].repeat(batch),
            for_graph(model, labels).repeat_interleave(window)[None],
            torch.ones(1, batch * window, outputs),
            torch.full((batch, 1, 1, 1), config.head_dim**-0.5),
            bias,
            cache,
        )
        for slots, new in zip(cache, fresh.chunk(2 * config.layers), strict=True):
            slots[:, :, position:end] = new
        found.append(flat.view(batch, window, -1))
        position = end
    return torch.cat(found, 1)


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("windows", [[1] * 15, [15], [4, 1, 7, 3], [8, 7]], ids=str)
def test_steps_of_any_window_invert_the_block(model: TarFlow, k: int, windows: list[int]) -> None:
    block, labels = model.blocks[k], labels_of(model, 3)
    x = torch.randn(3, model.config.tokens, model.config.patch_dim)
    with torch.no_grad():
        z = block.order(block.encode(x, labels)[0])
        ordered = block.order(x)
        found = walk(model, k, z, ordered, labels, windows)
    torch.testing.assert_close(found, ordered, atol=2e-5, rtol=1e-4)


def test_guided_forward_is_the_inverse_of_guided_decoding(model: TarFlow) -> None:
    labels = labels_of(model, 2).numpy()
    tokens = model.config.tokens
    branches = Branches(
        np.stack([labels, np.full(2, -1)]),
        guidance_mix(tokens, 0.8, "ab", annealed=True).numpy(),
        np.array([1.0, 1 / 0.7], np.float32),
    )
    twin, z = Twin(model), np.random.default_rng(0).normal(size=(2, tokens, model.config.patch_dim)).astype(np.float32)
    for k in range(2):
        decoding = twin.decoding(k, z, branches)
        for position in range(tokens - 1):
            decoding.step(position)
        x = decoding.patches()
        with torch.no_grad():
            back, _ = Forward(model.blocks[k])(
                torch.from_numpy(x),
                for_graph(model, torch.from_numpy(branches.labels)),
                torch.from_numpy(branches.mix),
                torch.from_numpy(branches.inverse_temperature),
            )
        assert np.abs(back.numpy() - z).max() < 1e-4
        assert np.abs(twin.forward(k, x, branches)[0] - z).max() < 1e-4


def test_no_patch_sees_itself_or_its_successors(model: TarFlow) -> None:
    block, labels = model.blocks[1], labels_of(model, 1)
    x = torch.randn(1, model.config.tokens, model.config.patch_dim)
    changed = x.clone()
    changed[:, 5] += 1  # block 1 is reversed: patches 0...4 come after it
    mix = torch.ones(2, 1, model.config.tokens)
    with torch.no_grad():
        a, _ = Forward(block)(x, for_graph(model, labels)[None], mix, torch.ones(1))
        b, _ = Forward(block)(changed, for_graph(model, labels)[None], mix, torch.ones(1))
    differs = (a != b).any(-1)[0]
    assert not differs[6:].any()
    assert differs[:6].all()
