"""Make the demo's feature network: a small classifier of scikit-learn's digits, cut before its last layer.

    python recipes/features.py tarflow/features

Writes digits.onnx, whose 64 features `tarflow evaluate` compares the demo by, and digits.npz, the statistics of all
1,797 digits under it. Same packages, same bytes: one thread, one seed, no data loader. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from tarflow.quality.features import FeatureNetwork
from tarflow.quality.frechet import Statistics, write_statistics
from tarflow.train.data import Split, digits

FEATURES = 64
OPSET = 17


class Classifier(nn.Module):
    """Two convolutions, 64 features, 10 classes; (N, 1, 8, 8) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv2d(1, 16, 3, padding=1)
        self.far = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.features = nn.Linear(32 * 4 * 4, FEATURES)
        self.classes = nn.Linear(FEATURES, 10)

    def embed(self, x: Tensor) -> Tensor:
        x = functional.relu(self.far(functional.relu(self.near(x))))
        return functional.relu(self.features(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classes(functional.dropout(self.embed(x), 0.3, self.training))
        return logits


def tensors(split: Split) -> tuple[Tensor, Tensor]:
    assert split.labels is not None
    return torch.from_numpy(split.images).float() / 127.5 - 1, torch.from_numpy(split.labels)


def train(steps: int, seed: int) -> Classifier:
    """A classifier of noisy digits: features that see a blur or a speck, and do not only tell a 3 from an 8."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    images, labels = tensors(digits().train)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        noisy = images[rows] + 0.1 * torch.randn(64, 1, 8, 8)
        loss = functional.cross_entropy(model(noisy), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def scale_features(model: Classifier, split: Split) -> None:
    """Give features a mean variance of 1 over the digits, so that a distance has a unit; the classes stay the same."""
    deviation = model.embed(tensors(split)[0]).var(0).mean().sqrt()
    model.features.weight /= deviation
    model.features.bias /= deviation
    model.classes.weight *= deviation


def to_onnx(model: Classifier) -> onnx.ModelProto:
    """The network as seven nodes, written by hand: no exporter's version in the file."""
    weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items() if "classes" not in name}
    nodes = [
        helper.make_node("Conv", ["images", "near.weight", "near.bias"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "far.weight", "far.bias"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "features.weight", "features.bias"], ["f"], transB=1),
        helper.make_node("Relu", ["f"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", FEATURES])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("tarflow/features"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    model = train(options.steps, options.seed)
    data = digits()
    scale_features(model, data.train)
    x, labels = tensors(data.held_out)
    with torch.no_grad():
        right = float((model(x).argmax(1) == labels).float().mean())
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "digits.onnx"
    path.write_bytes(to_onnx(model).SerializeToString(deterministic=True))

    network = FeatureNetwork.open(path)
    pixels = np.concatenate([data.train.images, data.held_out.images])
    with torch.no_grad():
        difference = float(np.abs(network(data.held_out.images) - model.embed(x).numpy()).max())
    write_statistics(options.folder / "digits.npz", Statistics.of(network(pixels)), network.identity)
    print(json.dumps({"held_out_recognised": right, "onnx_against_torch": difference, "images": len(pixels)}))


if __name__ == "__main__":
    main()
