"""Bundles of earlier versions: with graphs that nothing runs any more, or without the ones for devices."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tarflow.runtime.bundle import Bundle
from tarflow.runtime.errors import BundleError
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.manifest import read_manifest

from .conftest import DEMO, Exported, amend
from .cpp_library import BUNDLE, CppError, CppFlow

# The demo's manifest as it was, with one file more a block: graphs for TensorRT before 10.15.
OLD = (Path(__file__).parent / "data" / "manifest-with-pingpong.json").read_text()
GONE = tuple(f"block_{k:02}.pingpong.onnx" for k in range(4))


def without_graphs_for_devices(folder: Path) -> Path:
    manifest = json.loads((folder / "manifest.json").read_text())
    for block in manifest["blocks"]:
        name = block["graphs"].pop("resident")
        del manifest["files"][name]
        (folder / name).unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def with_graphs_that_are_gone(folder: Path) -> Path:
    """Its manifest names files as the old one does. They hold anything: nothing here ever ran them."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"blocks": json.loads(OLD)["blocks"]}))
    for name in GONE:
        (folder / name).write_bytes(name.encode() * 99)
    amend(folder, *GONE)
    return folder


@pytest.mark.parametrize("made_old", [with_graphs_that_are_gone, without_graphs_for_devices])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_old_bundles_draw_the_demos_bits_in_both_languages(
    copy: Exported, made_old: Callable[[Path], Path], guidance: float
) -> None:
    folder, labels = made_old(copy("demo")), np.arange(5)
    drawn, demo = (
        Flow.open(at).sample(5, labels=labels, seed=3, guidance=Guidance(guidance), reproducible=True)
        for at in (folder, DEMO)
    )
    assert np.array_equal(drawn, demo)
    how: dict[str, Any] = {"labels": labels, "seed": 3, "guidance": guidance, "reproducible": 1}
    found, expected = (CppFlow(at).sample(5, **how) for at in (folder, DEMO))
    assert np.array_equal(found, expected)


def test_the_manifest_of_an_older_demo_says_what_todays_says(demo: Path) -> None:
    manifest = read_manifest(OLD.encode())
    assert [tuple(block.graphs) for block in manifest.blocks] == [("step", "forward", "gradient", "resident")] * 4
    files = {name: entry for name, entry in manifest.files.items() if name not in GONE}
    assert len(files) == len(manifest.files) - len(GONE)
    assert replace(manifest, files=files) == Bundle.open(demo).manifest


def test_such_a_graph_is_still_a_file_of_the_bundle(copy: Exported) -> None:
    """Damaged or missing, it is named in both languages."""
    old = with_graphs_that_are_gone(copy("demo"))
    path = old / GONE[2]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    for damage in ("is damaged or was changed", "is missing, though the manifest names it"):
        with pytest.raises(BundleError, match=rf"block_02\.pingpong\.onnx' {damage}"):
            Flow.open(old)
        with pytest.raises(CppError, match=rf"block_02\.pingpong\.onnx' {damage}") as refused:
            CppFlow(old)
        assert refused.value.status == BUNDLE
        path.unlink(missing_ok=True)


def test_a_bundle_without_graphs_for_devices_is_refused_on_a_gpu(copy: Exported) -> None:
    older = without_graphs_for_devices(copy("demo"))
    with pytest.raises(BundleError, match="exported before there were graphs for devices"):
        Flow.open(older, provider="cuda")
    with pytest.raises(CppError, match="exported before there were graphs for devices") as refused:
        CppFlow(older, provider=b"cuda")
    assert refused.value.status == BUNDLE
