"""Make the Inception network that Frechet distances are usually measured with, as ONNX, from a file of its weights:

    python recipes/inception.py --weights pt_inception-2015-12-05-6726825d.pth --size 64 -o inception64.onnx
    tarflow evaluate BUNDLE --against photos/ --features inception64.onnx --feature-range 0,255 --n 50000

Two sets of weights go by that name, and their distances are on different scales:

- *FID's*: TensorFlow's network of 2015, as pytorch-fid, torch-fidelity and torchmetrics distribute it for PyTorch
  (1008 classes). Papers' numbers are of these. Pooling leaves padding out of its means, the last block takes a maximum,
  images are resized to 299 as TensorFlow 1 did, pixels become (x - 128) / 128.
- *torchvision's* (1000 classes), trained anew on ImageNet: `inception_v3(weights="IMAGENET1K_V1").state_dict()`. A good
  network of features, but no number of its compares with a paper's.

Which it is, the file tells. The network takes pixels 0 ... 255 of images of one size, resizes them itself, and gives
2048 numbers. What is printed: which weights these are, and the largest difference of ONNX Runtime from PyTorch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

SIDE, FEATURES = 299, 2048
FID_CLASSES = 1008
PUBLISHED = {"fid": "those of papers", "torchvision": "its own: not to be compared with papers"}


class Conv(nn.Module):
    def __init__(self, cin: int, cout: int, kernel: int | tuple[int, int], **how: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, bias=False, **how)
        self.bn = nn.BatchNorm2d(cout, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side. ``branches`` are chains of convolutions by their names; ``pool`` is what the pooling
    branch begins with: a "mean", a mean "inside" that leaves padding out, or a "max"; "": it halves, and is no more.
    """

    def __init__(self, cin: int, branches: list[list[tuple[Any, ...]]], pool: str) -> None:
        super().__init__()
        self.chains, self.pool = [], pool
        for branch in branches:
            width = cin
            for name, cout, kernel, *more in branch:
                if name.endswith("b") and name[:-1] + "a" in self._modules:  # beside its twin, not behind it
                    width = self._modules[name[:-1] + "a"].conv.in_channels  # type: ignore[union-attr]
                self.add_module(name, Conv(width, cout, kernel, **(more[0] if more else {})))
                width = cout
            self.chains.append([name for name, *_ in branch])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._branch(chain, x) for chain in self.chains] + ([] if self.pool else [_halved(x)]), 1)

    def _branch(self, chain: list[str], x: Tensor) -> Tensor:
        if chain[0] == "branch_pool":
            x = functional.max_pool2d(x, 3, 1, 1) if self.pool == "max" else functional.avg_pool2d(
                x, 3, 1, 1, count_include_pad=self.pool == "mean"
            )  # fmt: skip
        split: list[Tensor] = []
        for name in chain:
            if name.endswith("b") and name[:-1] + "a" in chain:
                split[-1] = torch.cat([split[-1], self._modules[name](split[-2])], 1)  # type: ignore[misc]
            else:
                split.append(self._modules[name](split[-1] if split else x))  # type: ignore[misc]
        return split[-1]


def _halved(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, 2)


def _a(cin: int, pooled: int, mean: str) -> Mixed:
    same = {"padding": 1}
    five = [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5, {"padding": 2})]
    double = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3, same), ("branch3x3dbl_3", 96, 3, same)]
    return Mixed(cin, [[("branch1x1", 64, 1)], five, double, [("branch_pool", pooled, 1)]], mean)


def _b(cin: int) -> Mixed:
    double = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3, {"padding": 1})]
    return Mixed(cin, [[("branch3x3", 384, 3, {"stride": 2})], [*double, ("branch3x3dbl_3", 96, 3, {"stride": 2})]], "")


def _c(cin: int, width: int, mean: str) -> Mixed:
    row, column = ((1, 7), {"padding": (0, 3)}), ((7, 1), {"padding": (3, 0)})
    once = [("branch7x7_1", width, 1), ("branch7x7_2", width, *row), ("branch7x7_3", 192, *column)]
    twice: list[tuple[Any, ...]] = [("branch7x7dbl_1", width, 1)]
    for k, (cout, how) in enumerate(((width, column), (width, row), (width, column), (192, row)), start=2):
        twice.append((f"branch7x7dbl_{k}", cout, *how))
    return Mixed(cin, [[("branch1x1", 192, 1)], once, twice, [("branch_pool", 192, 1)]], mean)


def _d(cin: int) -> Mixed:
    three = [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, {"stride": 2})]
    row, column = ((1, 7), {"padding": (0, 3)}), ((7, 1), {"padding": (3, 0)})
    seven = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, *row), ("branch7x7x3_3", 192, *column)]
    return Mixed(cin, [three, [*seven, ("branch7x7x3_4", 192, 3, {"stride": 2})]], "")


def _e(cin: int, pool: str) -> Mixed:
    row, column = ((1, 3), {"padding": (0, 1)}), ((3, 1), {"padding": (1, 0)})
    three = [("branch3x3_1", 384, 1), ("branch3x3_2a", 384, *row), ("branch3x3_2b", 384, *column)]
    double = [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3, {"padding": 1})]
    double += [("branch3x3dbl_3a", 384, *row), ("branch3x3dbl_3b", 384, *column)]
    return Mixed(cin, [[("branch1x1", 320, 1)], three, double, [("branch_pool", 192, 1)]], pool)


class Inception(nn.Module):
    """Images (N, 3, size, size), 0 ... 255 -> (N, 2048). ``fid`` is what tells FID's network from torchvision's."""

    def __init__(self, size: int, fid: bool) -> None:
        super().__init__()
        mean = "inside" if fid else "mean"
        self.fid = fid
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, stride=2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32, mean), _a(256, 64, mean), _a(288, 64, mean)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c = _c(768, 128, mean), _c(768, 160, mean)
        self.Mixed_6d, self.Mixed_6e = _c(768, 160, mean), _c(768, 192, mean)
        self.Mixed_7a = _d(768)
        self.Mixed_7b, self.Mixed_7c = _e(1280, mean), _e(2048, "max" if fid else "mean")
        self.register_buffer("across", resizing(size, asymmetric=fid), persistent=False)  # (299, size)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.across @ pixels @ self.across.T  # type: ignore[operator]
        if self.fid:
            x = (x - 128) / 128
        else:
            mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
            x = (x / 255 - mean[:, None, None]) / std[:, None, None]
        x = _halved(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = _halved(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))


def resizing(size: int, asymmetric: bool) -> Tensor:
    """(299, size): bilinear weights, not antialiased. TensorFlow 1 samples at k * size / 299, others in the middle of
    pixels.
    """
    places = np.arange(SIDE) * size / SIDE if asymmetric else (np.arange(SIDE) + 0.5) * size / SIDE - 0.5
    places = np.clip(places, 0, size - 1)
    low = np.floor(places).astype(int)
    weights = np.zeros((SIDE, size), np.float32)
    np.add.at(weights, (np.arange(SIDE), low), 1 - (places - low))
    np.add.at(weights, (np.arange(SIDE), np.minimum(low + 1, size - 1)), places - low)
    return torch.from_numpy(weights)


def load(weights: Path, size: int) -> Inception:
    """The network of a file's weights. Raises SystemExit for a file that holds no such network."""
    state = torch.load(weights, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "fc.weight" not in state:
        raise SystemExit(f"'{weights}' holds no Inception v3: expected its state_dict, with fc.weight in it")
    model = Inception(size, fid=len(state["fc.weight"]) == FID_CLASSES)
    own = {name: tensor for name, tensor in state.items() if not name.startswith(("fc.", "AuxLogits."))}
    missing, strange = model.load_state_dict(own, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or strange:
        raise SystemExit(f"'{weights}' holds no Inception v3: {[*missing, *strange][:4]} are missing or strange")
    return model.eval()


@torch.no_grad()
def write(model: Inception, size: int, path: Path) -> float:
    """Write the network; returns its largest difference from PyTorch, relative to the largest feature."""
    import onnxruntime

    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, size, size)).astype(np.float32))
    batch = {0: torch.export.Dim("N")}
    made = torch.onnx.export(model, (pixels,), dynamo=True, input_names=["images"], output_names=["features"],
                             dynamic_shapes=(batch,), verbose=False)  # fmt: skip
    assert made is not None
    made.save(path)
    (found,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        None, {"images": pixels.numpy()}
    )
    expected = model(pixels).numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="the state_dict, FID's or torchvision's")
    parser.add_argument("--size", type=int, required=True, help="side of the images, in pixels")
    parser.add_argument("-o", "--output", type=Path, default=Path("inception.onnx"))
    options = parser.parse_args()
    model = load(options.weights, options.size)
    kind = "fid" if model.fid else "torchvision"
    difference = write(model, options.size, options.output)
    print(
        json.dumps(
            {"weights": kind, "distances": PUBLISHED[kind], "features": FEATURES, "onnx_against_torch": difference}
        )
    )


if __name__ == "__main__":
    main()
