"""Small colour crops of the two photographs that scikit-learn ships, two classes, as folders of PNG files to train on.

    python recipes/photos.py OUT [--size 32] [--count 4096]

Crops are taken at random places of the photographs and of their halved copies, from a fixed seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--count", type=int, default=4096)
    options = parser.parse_args()

    dice = np.random.default_rng(0)
    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        whole = Image.fromarray(pixels)
        sizes = [whole, whole.resize((whole.width // 2, whole.height // 2), Image.Resampling.LANCZOS)]
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(options.count // 2):
            image = sizes[number % 2]
            left, top = dice.integers(image.width - options.size), dice.integers(image.height - options.size)
            image.crop((left, top, left + options.size, top + options.size)).save(folder / f"{number:05}.png")


if __name__ == "__main__":
    main()
