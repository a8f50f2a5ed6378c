"""How far the demo's samples are from the digits, beside two halves of the digits, and what a precision costs.

    python -m bench.frechet fp32=tarflow/demo fp16=runs/demo-fp16 int8=runs/demo-int8

Prints one JSON document. Bundles draw the same samples (seed, index, label), and the bootstrap takes the same rows of
each, so that the difference of two distances is known far better than either distance.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from numpy.typing import NDArray

from tarflow.cli.evaluate import DIGITS
from tarflow.quality.features import FeatureNetwork
from tarflow.quality.frechet import Statistics, distance, estimate, square_root
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.image import to_uint8
from tarflow.train.data import digits

Features = NDArray[np.float32]


def draw(bundle: str, network: FeatureNetwork, n: int, guidance: float, seed: int) -> Features:
    flow = Flow.open(bundle, spinning=False)
    return network(to_uint8(flow.sample(n, labels=np.arange(n) % 10, guidance=Guidance(guidance), seed=seed)))


def halves(real: Features, drawn: Features, repeats: int) -> dict[str, list[float]]:
    """Mean and deviation over random halves of the digits: one against the other, and as many samples against it."""
    dice = np.random.default_rng(0)
    rows: list[tuple[float, float]] = []
    for _ in range(repeats):
        order = dice.permutation(len(real))
        middle = len(real) // 2
        half = Statistics.of(real[order[:middle]])
        other = Statistics.of(real[order[middle:]])
        samples = Statistics.of(drawn[dice.choice(len(drawn), len(real) - middle, replace=False)])
        rows.append((distance(other, half), distance(samples, half)))
    table = np.array(rows)
    names = ("digits_against_other_half", "as_many_samples_against_half")
    return {name: [float(c.mean()), float(c.std(ddof=1))] for name, c in zip(names, table.T, strict=True)}


def paired(first: Features, second: Features, reference: Statistics, resamples: int) -> list[float]:
    """Difference of the two distances to the reference, and its standard error: the same rows drawn again of both."""
    root = square_root(reference.covariance)
    dice = np.random.default_rng(0)
    even = np.full(len(first), 1 / len(first))
    draws = [dice.multinomial(len(first), even) for _ in range(resamples)]
    again = [
        distance(Statistics.of(second, w), reference, root) - distance(Statistics.of(first, w), reference, root)
        for w in draws
    ]
    difference = distance(Statistics.of(second), reference, root) - distance(Statistics.of(first), reference, root)
    return [difference, float(np.std(again, ddof=1))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="NAME=BUNDLE")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resamples", type=int, default=200)
    options = parser.parse_args()

    network, data = FeatureNetwork.open(DIGITS), digits()
    real = network(np.concatenate([data.train.images, data.held_out.images]))
    reference = Statistics.of(real)
    result: dict[str, object] = {"n": options.n, "guidance": options.guidance, "seed": options.seed}
    drawn: dict[str, Features] = {}
    for item in options.bundles:
        name, bundle = item.split("=", 1)
        drawn[name] = draw(bundle, network, options.n, options.guidance, options.seed)
        found = estimate(drawn[name], reference, options.resamples)
        result[name] = {"distance": found.distance, "standard_error": found.standard_error, "bias": found.bias}
    first = next(iter(drawn))
    for name in list(drawn)[1:]:
        difference = paired(drawn[first], drawn[name], reference, options.resamples)
        between = distance(Statistics.of(drawn[name]), Statistics.of(drawn[first]))
        result[f"{name} less {first}"] = {"difference": difference, "distance_of_the_two": between}
    result["halves of the digits"] = halves(real, drawn[first], 50)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
