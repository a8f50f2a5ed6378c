"""How many class-conditional samples of a digits model a classifier of real digits takes for their class.

    python recipes/recognise.py runs/digits/digits_model_2_128_4_3_0.15.safetensors

Prints one JSON document: the share recognised for each seed, guided with a constant 1.0 and denoised, beside the
share of real held-out digits the same classifier gets right; and held-out bits per dimension of noisy digits.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.svm import SVC

from tarflow import checkpoint
from tarflow.model import TarFlow
from tarflow.train.data import digits
from tarflow.train.loop import measure


def sixteenths(images: NDArray[np.floating] | NDArray[np.uint8]) -> NDArray[np.float64]:
    """Images (N, 1, 8, 8) in 0..255 -> (N, 64) in 0..16, the scale of scikit-learn's digits, unrounded."""
    return images.reshape(len(images), -1).astype(np.float64) * 16 / 255


def draw(model: TarFlow, labels: torch.Tensor, guidance: float, seed: int) -> NDArray[np.float64]:
    """One sample a label, as the picture of it would show it: (N, 1, 8, 8) in 0..255."""
    dice = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), model.config.tokens, model.config.patch_dim, generator=dice)
    images = model.decode(noise, labels, guidance)
    if model.config.noise_std:
        images = model.denoise(images, labels)
    return np.round((images.clamp(-1, 1).numpy() + 1) * 127.5).astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--samples", type=int, default=1000, help="for each seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--draws", type=int, default=16, help="draws of noise for each held-out digit")
    options = parser.parse_args()

    model = checkpoint.load(options.checkpoint)
    data = digits()
    assert data.train.labels is not None
    assert data.held_out.labels is not None
    judge = SVC(gamma=0.001, C=10).fit(sixteenths(data.train.images), data.train.labels)
    labels = torch.arange(options.samples) % 10
    rates = [
        float((judge.predict(sixteenths(draw(model, labels, options.guidance, seed))) == labels.numpy()).mean())
        for seed in range(options.seeds)
    ]
    result = {
        "checkpoint": options.checkpoint,
        "guidance": options.guidance,
        "samples_per_seed": options.samples,
        "recognised": {str(seed): rate for seed, rate in enumerate(rates)},
        "recognised_mean": float(np.mean(rates)),
        "real_held_out_recognised": float(judge.score(sixteenths(data.held_out.images), data.held_out.labels)),
        "held_out_bits_per_dim": measure(model, data.held_out, options.draws),
        "train_bits_per_dim": measure(model, data.train, max(options.draws // 4, 1)),
        "draws": options.draws,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
