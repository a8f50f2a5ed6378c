"""The bundle's reader: it takes what is whole, and refuses everything else with one error that names the file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tarflow.quality.parity import stored_pairs
from tarflow.runtime.bundle import GOLDEN, KINDS, MANIFEST, WEIGHTS, Bundle
from tarflow.runtime.errors import BundleError
from tarflow.runtime.files import sha256
from tarflow.runtime.flow import Flow
from tarflow.runtime.manifest import Manifest, read_manifest
from tarflow.runtime.plan import check_place
from tarflow.runtime.precision import PRECISIONS

from .conftest import DEMO, Exported, amend

STEP = "block_00.step.onnx"
HASH = "0" * 64
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def a_manifest() -> dict[str, Any]:
    """The demo's manifest, of one block with the graphs that every bundle has: a document to spoil."""
    document: dict[str, Any] = json.loads((DEMO / MANIFEST).read_bytes())
    document["config"]["blocks"], graphs = 1, {kind: f"block_00.{kind}.onnx" for kind in KINDS}
    return document | {
        "blocks": [{"reversed": False, "graphs": graphs}],
        "files": {name: {"sha256": HASH, "size": 1} for name in (*graphs.values(), WEIGHTS, GOLDEN)},
        "parity": {"samples": 4, "blocks": [{"block": 0, "rms": 1e-7}]},
    }


def encoded(document: object) -> bytes:
    return json.dumps(document).encode()


@contextlib.contextmanager
def refusal(*words: str) -> Iterator[None]:
    """The block raises BundleError, with exit code 4 and these words in its message."""
    with pytest.raises(BundleError) as caught:
        yield
    assert caught.value.exit_code == 4
    for word in words:
        assert word in str(caught.value)


def reads_or_refuses(content: bytes) -> Manifest | None:
    """What every content must do. A manifest that was read can be written and read again."""
    try:
        manifest = read_manifest(content)
    except BundleError as error:
        code, message = error.exit_code, str(error)
    else:
        assert read_manifest(manifest.to_json().encode()) == manifest
        return manifest
    assert code == 4
    assert len(message) < 2000, "a message is for reading"
    return None


# --- any valid manifest ------------------------------------------------------------------------------------------

_component = st.text(st.characters(codec="utf-8", exclude_characters="/\\:\0"), min_size=1, max_size=8).filter(
    lambda part: part not in (".", "..")
)
_names = st.lists(_component, min_size=1, max_size=3).map("/".join)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


_entries = st.fixed_dictionaries(
    {"sha256": st.text("0123456789abcdef", min_size=64, max_size=64), "size": st.integers(0, 2**63 - 1)}
)
_changes = st.fixed_dictionaries(
    {
        "name": st.text(max_size=20),
        "precision": st.sampled_from(list(PRECISIONS)),
        "opset": st.integers(1, 100),
        "exporter": st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
        "parity": st.dictionaries(st.text(max_size=5), _json, max_size=3),
    }
)
_noise = st.none() | st.integers(0, 3) | st.floats(0, 10)


@given(_changes, _noise, st.dictionaries(_names, _entries, min_size=1, max_size=6))
@QUICK
def test_any_manifest_survives_being_read_and_written(
    changes: dict[str, Any], noise_std: float | None, files: dict[str, Any]
) -> None:
    document = a_manifest() | changes
    document["files"] |= files
    document["config"]["noise_std"] = noise_std
    step = min(files).replace("/", "_") + ".onnx"
    document["files"][step] = min(files.values(), key=lambda entry: entry["size"])
    document["blocks"][0]["graphs"]["step"] = step
    assert json.loads(read_manifest(encoded(document)).to_json()) == document


# --- any spoiled manifest ----------------------------------------------------------------------------------------


def places(node: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of everything inside a JSON document."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inside:
        yield (*path, key)
        yield from places(value, (*path, key))


def spoiled(path: tuple[str | int, ...], change: Callable[[Any, Any], None]) -> bytes:
    """The manifest with ``change(parent, key)`` done at ``path``; the text @1e999 in it becomes that number."""
    document = a_manifest()
    parent: Any = document
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return encoded(document).replace(b'"@1e999"', b"1e999")


def put(value: object) -> Callable[[Any, Any], None]:
    """A change that replaces what stands at a place."""
    return lambda parent, key: parent.__setitem__(key, value)


PLACES = sorted(places(a_manifest()), key=str)
OTHER_KEYS = ("noise_std", "classes", "nvp")  # of a configuration: no size, or 0 is one
HUGE = 10**400  # an integer JSON may hold and a float may not
WRONG: list[object] = [None, True, False, 0, -1, 2, 1.0, 1.5, 2**63, HUGE, -HUGE, 1e308, "@1e999", "", "x", "1", ".."]
WRONG += [*map(float, ("nan", "inf", "-inf")), "/etc/passwd", "\ud800", "\0", [], [[]], [{}], {}, {"x": []}]
_values = st.sampled_from(WRONG) | _json


@given(st.sampled_from(PLACES), _values)
@example(("blocks", 0, "graphs", "step"), [])
@example(("blocks", 0, "graphs", "forward"), {})
@example(("config", "noise_std"), HUGE)
@example(("parity", "samples"), "@1e999")
@settings(QUICK, max_examples=600)
def test_a_manifest_with_any_value_replaced_reads_or_is_refused(path: tuple[str | int, ...], value: object) -> None:
    reads_or_refuses(spoiled(path, put(value)))


@pytest.mark.parametrize("path", PLACES, ids=lambda path: ".".join(map(str, path)))
def test_a_manifest_that_lacks_any_key_reads_or_is_refused(path: tuple[str | int, ...]) -> None:
    manifest = reads_or_refuses(spoiled(path, lambda parent, key: parent.__delitem__(key)))
    optional = path[0] in ("parity", "exporter") and len(path) > 1
    assert (manifest is not None) == optional


NO_SIZES = [0, -8, True, 8.0, 2**63, HUGE, "8", None]
NO_HASHES = [HASH.upper().replace("0", "A"), HASH[1:], HASH + "0", HASH + "\n", "", "g" * 64]
REFUSED: list[tuple[tuple[str | int, ...], list[Any], tuple[str, ...]]] = [
    *((("config", key), NO_SIZES, (MANIFEST, key)) for key in a_manifest()["config"] if key not in OTHER_KEYS),
    (("config", "noise_std"), [float("nan"), float("inf"), -1, "@1e999", HUGE, True, "0.1"], (MANIFEST,)),
    (("schema",), [2, 0, -1, "1", True, None, 1.5, [1], HUGE], ("schema", "version 1")),
    (("format",), ["other-bundle", "", None, 1, ["tarflow-bundle"]], ("tarflow-bundle",)),
    (("files", WEIGHTS, "sha256"), NO_HASHES, ("SHA-256",)),
]


@pytest.mark.parametrize(("path", "values", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_value_of_the_wrong_kind_is_refused_and_its_place_named(
    path: tuple[str | int, ...], values: list[object], words: tuple[str, ...]
) -> None:
    for value in values:
        with refusal(*words):
            read_manifest(spoiled(path, put(value)))


@pytest.mark.parametrize("place", [(), ("config",), ("blocks", 0), ("blocks", 0, "graphs"), ("files", WEIGHTS)])
def test_keys_of_a_later_version_are_left_alone(place: tuple[str | int, ...]) -> None:
    extended = spoiled((*place, "added_later"), put({"anything": [1, None]}))
    assert read_manifest(extended) == read_manifest(encoded(a_manifest()))


@pytest.mark.parametrize("path", [("format",), ("precision",), ("blocks", 0, "graphs", "step"), ("schema",)])
def test_a_message_about_a_huge_value_stays_short(path: tuple[str | int, ...]) -> None:
    reads_or_refuses(spoiled(path, put("x" * 100_000)))


@given(st.binary(max_size=200))
@example(b"")
@example(b"null")
@example(b"[]")
@example(b'"tarflow-bundle"')
@example(b"{")
@example(b"\xff\xfe{}")
@example(b"\xef\xbb\xbf{}")
@QUICK
def test_bytes_that_are_no_manifest_are_refused(content: bytes) -> None:
    with refusal(MANIFEST):
        read_manifest(content)


@pytest.mark.parametrize("depth", [10, 300, 900, 3_000, 100_000])
def test_a_deeply_nested_manifest_reads_or_is_refused(depth: int) -> None:
    brackets = b"[" * depth + b"]" * depth
    with refusal(MANIFEST):
        read_manifest(brackets)
    with refusal(MANIFEST):
        read_manifest(b"[" * depth)
    reads_or_refuses(encoded(a_manifest()).replace(b'"samples": 4', b'"samples": ' + brackets))


NO_NAMES = ["", ".", "..", "/etc/passwd", "//host/x", "../x", "a/../x", "a/..", "a//b", "a/", "./a", "a/."]
NO_NAMES += ["..\\x", "a\\b", "C:x", "C:/x", "C:\\x", "\\\\host\\x", "\0", "a\0b", "\ud800"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_file_name_that_could_lead_outside_is_refused(name: str) -> None:
    with refusal(MANIFEST):
        read_manifest(spoiled(("files", name), put({"sha256": HASH, "size": 1})))


# --- a folder and its files --------------------------------------------------------------------------------------


@pytest.fixture
def folder(copy: Exported) -> Path:
    return copy("cond")


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_an_intact_bundle_opens_and_checks_by_a_link_and_by_a_relative_path_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(folder)
    bundle.check()
    assert bundle.hash == sha256(folder / MANIFEST)
    (tmp_path / "link").symlink_to(folder)
    Bundle.open(tmp_path / "link").check()
    monkeypatch.chdir(folder)
    Bundle.open(".").check()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The demo bundle, to be changed."""
    return shutil.copytree(DEMO, tmp_path / "own", ignore=shutil.ignore_patterns("plans", "engines"))


@pytest.mark.parametrize("inner", ["", "imagenet64"])
def test_a_bundle_opens_as_hubs_and_git_lay_it_out(inner: str, own: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "model" / "snapshots" / "r" / inner, tmp_path / "model" / "blobs"
    for new in (snapshot, blobs, tmp_path / "elsewhere"):
        new.mkdir(parents=True)
    for path in own.iterdir():
        blob = path.rename(blobs / sha256(path))
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    for name in (".gitattributes", "README.md", "LICENSE", ".DS_Store", ".nfs0001"):
        (snapshot / name).touch()
    (tmp_path / "link").symlink_to(snapshot)
    assert Flow.open(tmp_path / "link").sample(1).shape == (1, 1, 8, 8)
    (blobs / sha256(snapshot / STEP)).rename(tmp_path / "elsewhere" / "blob")
    (snapshot / STEP).unlink()
    (snapshot / STEP).symlink_to(tmp_path / "elsewhere" / "blob")
    with refusal(STEP, "leads out of the bundle"):
        Bundle.open(snapshot)


@pytest.mark.parametrize("place", ["plans", "plans/here.json", "engines", "engines/gpu", "engines/gpu/x.engine"])
def test_nothing_is_written_through_links_in_a_bundle(place: str, own: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (own / place).parent.mkdir(parents=True, exist_ok=True)
    (own / place).symlink_to(outside)
    bundle = Bundle.open(own)
    with refusal(f"'{own / place}' is a link"):
        check_place(bundle, "here") if "plans" in place else bundle.own("engines")
    assert not list(outside.iterdir())


@pytest.mark.parametrize("same", [False, True], ids=["by another", "by a copy"])
@pytest.mark.parametrize(
    "moment", ["before its first use", "before another graph", "between two calls", "within a call"]
)
def test_a_bundle_that_is_open_stays_that_bundle(moment: str, same: bool, own: Path, tmp_path: Path) -> None:
    other = shutil.copytree(own, tmp_path / "other")
    if not same:
        flip(other / WEIGHTS, -3)
        amend(other, WEIGHTS)
    flow = Flow.open(own, threads=1, memory="least" if moment == "between two calls" else None)
    expected = Flow.open(own, threads=1).sample(1, denoise=False)

    def replace() -> None:
        own.rename(tmp_path / "old")
        other.rename(own)

    def use() -> None:
        if moment in ("before another graph", "between two calls"):
            flow.sample(1, denoise=False)
        if moment != "within a call":
            replace()
        if moment == "before another graph":
            flow.encode(expected)
        else:
            found = flow.sample(
                1, denoise=False, progress=lambda at: replace() if other.exists() and at.done == 3 else None
            )
            np.testing.assert_array_equal(found, expected)

    with contextlib.nullcontext() if same else refusal("was replaced while it was open"):
        use()


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty folder").mkdir()
    for path in (tmp_path / name for name in ("nothing", "file", "empty folder")):
        with refusal(str(path)):
            Bundle.open(path)


def test_a_huge_manifest_is_refused_unread(folder: Path) -> None:
    with (folder / MANIFEST).open("r+b") as file:
        file.truncate(17 << 20)
    with refusal(MANIFEST, "16 MiB"):
        Bundle.open(folder)


def moved_out(path: Path) -> None:
    path.symlink_to(path.rename(path.parent.parent / f"outside {path.name}"))


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def cut(kept: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[:kept])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, ""),
    "a link out": (moved_out, "out of the bundle"),
    "a folder": (replaced(Path.mkdir), ""),
    "a pipe": (replaced(os.mkfifo), ""),
    "a link to itself": (replaced(lambda path: path.symlink_to(path)), ""),
    "a link to nothing": (replaced(lambda path: path.symlink_to("nothing")), ""),
    **{f"cut to {kept}": (cut(kept), "truncated") for kept in (0, 1, 1000, -1)},
    "grown": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), ""),
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in (WEIGHTS, GOLDEN, STEP) for damage in DAMAGES),
        *((MANIFEST, damage) for damage in ("missing", "a link out", "a folder", "a pipe")),
    ],
)
def test_a_file_that_is_not_what_the_manifest_says_is_refused_and_named(name: str, damage: str, folder: Path) -> None:
    damaged, words = DAMAGES[damage]
    damaged(folder / name)
    with refusal(name, words):
        Bundle.open(folder)


def test_a_linked_folder_that_leads_out_of_the_bundle_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    shutil.copy(folder / GOLDEN, tmp_path / "outside" / "file")
    (folder / "inside").symlink_to(tmp_path / "outside")
    amend(folder, "inside/file")
    with refusal("inside/file"):
        Bundle.open(folder)


def test_a_file_name_the_system_cannot_hold_is_refused(folder: Path) -> None:
    document = json.loads((folder / MANIFEST).read_bytes())
    document["files"]["x" * 5000] = document["files"][GOLDEN]
    (folder / MANIFEST).write_text(json.dumps(document))
    with refusal("missing"):
        Bundle.open(folder)


# --- damage ------------------------------------------------------------------------------------------------------


@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=300, deadline=None)
def test_a_manifest_cut_short_is_refused_and_one_with_a_bit_flipped_reads_or_is_refused(share: float, bit: int) -> None:
    content = bytearray((DEMO / MANIFEST).read_bytes().rstrip())
    place = int(share * len(content))
    with refusal(MANIFEST):
        read_manifest(bytes(content[:place]))
    content[place] ^= 1 << bit
    reads_or_refuses(bytes(content))


@given(name=st.sampled_from([WEIGHTS, GOLDEN, STEP]), share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])  # it is mended
def test_any_bit_flipped_in_any_file_is_found_and_the_file_named(
    name: str, share: float, bit: int, folder: Path
) -> None:
    path = folder / name
    position = int(share * path.stat().st_size)
    flip(path, position, bit)
    try:
        with refusal(name, "SHA-256"):
            Bundle.open(folder).check()
    finally:
        flip(path, position, bit)
    Bundle.open(folder).check(name)


def test_flipped_golden_pairs_are_never_parsed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(folder / GOLDEN, 4)
    monkeypatch.setattr("safetensors.numpy.load", lambda content: pytest.fail("parsed before its hash was checked"))
    with refusal(GOLDEN, "SHA-256"):
        Bundle.open(folder).tensors(GOLDEN)


@pytest.mark.parametrize("content", [b"\0" * 7, b"\xff" * 64, b"\x02" + b"\0" * 7 + b"{", b"PK\x03\x04junk"])
@pytest.mark.parametrize("name", [GOLDEN, WEIGHTS])
def test_tensors_that_are_none_are_refused_though_their_hash_is_right(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)
    amend(folder, name)
    with refusal(name):
        Bundle.open(folder).tensors(name)


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("noise", None),
        ("labels", None),
        ("images", None),
        ("noise", np.zeros((4, 16, 3), np.float32)),
        ("labels", np.zeros((), np.int64)),
        ("labels", np.zeros(4, np.float32)),
        ("labels", np.zeros(0, np.int64)),
        ("images", np.zeros((3, 1, 8, 8), np.float32)),
        ("denoised", np.zeros((4, 1, 8, 8), np.float64)),
    ],
)
def test_golden_pairs_that_are_none_of_the_model_are_refused(
    name: str, damaged: NDArray[Any] | None, folder: Path
) -> None:
    tensors = Bundle.open(folder).tensors(GOLDEN)
    del tensors[name]
    save_file(tensors if damaged is None else tensors | {name: damaged}, folder / GOLDEN)
    amend(folder, GOLDEN)
    with refusal(GOLDEN, f"`{name}`"):
        stored_pairs(Bundle.open(folder))


def test_a_prior_variance_that_does_not_fit_is_refused(copy: Exported) -> None:
    folder = copy("vp")
    tensors = load_file(folder / WEIGHTS)
    shape = tensors.pop("var").shape
    assert Bundle.open(folder).prior_variance().shape == shape
    numbers = [np.full(shape, number, np.float32) for number in (-1, np.nan, np.inf)]
    wrong: list[dict[str, Any]] = [
        {"var": var} for var in (np.ones(shape, np.float64), np.ones(shape[::-1], np.float32), *numbers)
    ]
    for found in (*wrong, {}):
        save_file(tensors | found, str(folder / WEIGHTS))
        amend(folder, WEIGHTS)
        with refusal(WEIGHTS, "prior variance"):
            Bundle.open(folder).prior_variance()


@pytest.mark.parametrize("name", [WEIGHTS, STEP, "block_03.gradient.onnx", "block_01.forward.onnx"])
def test_hashes_are_checked_before_onnx_runtime_sees_a_file(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    handed: list[str] = []
    session = onnxruntime.InferenceSession

    def record(path: str, *rest: Any, **options: Any) -> Any:
        handed.append(path)
        return session(path, *rest, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    Flow.open(folder, provider="cpu").sample(1)
    assert str(folder / STEP) in handed
    handed.clear()
    flip(folder / name, (folder / name).stat().st_size // 2)
    for provider in ("cpu", "auto"):
        with refusal(name, "SHA-256"):
            Flow.open(folder, provider=provider).sample(1)
    assert handed == []


# --- graphs that lie, with hashes that agree ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [*((STEP, content) for content in (b"", b"\0" * 100, b"\x08\x09" * 50, b"not a graph")), (WEIGHTS, None)],
)
def test_a_graph_that_is_none_and_weights_cut_short_are_refused_though_their_hash_is_right(
    name: str, content: bytes | None, folder: Path
) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:100_000] if content is None else content)
    amend(folder, name)
    with refusal(name):
        Flow.open(folder, provider="cpu").sample(1)


def relocate(graph: Path, location: str) -> int:
    """Point all external data of a graph at another file; how many tensors that moved."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    moved = 0
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value, moved = location, moved + 1
    onnx.save(model, graph)
    amend(graph.parent, graph.name)
    return moved


def test_a_graph_takes_its_weights_from_the_weights_file_and_from_no_other_of_the_bundle(folder: Path) -> None:
    """Shows that :func:`relocate` makes graphs that work, so that the refusals are about the place."""
    before = Flow.open(folder).sample(1)
    shutil.copy(folder / WEIGHTS, folder / "copy.safetensors")
    amend(folder, "copy.safetensors")
    assert relocate(folder / STEP, "copy.safetensors") > 3
    with refusal(STEP, "copy.safetensors"):
        Flow.open(folder)
    assert relocate(folder / STEP, WEIGHTS) > 3
    np.testing.assert_array_equal(Flow.open(folder).sample(1), before)


@pytest.mark.parametrize(
    "location",
    ["../outside", "{folder}/../outside", "{outside}", "sub-link/link", "sub/../../outside", "linked/outside"],
)
def test_a_graph_that_takes_its_weights_from_outside_is_refused(location: str, folder: Path, tmp_path: Path) -> None:
    outside = Path(shutil.copy(folder / WEIGHTS, tmp_path / "outside"))
    (folder / "sub-link").mkdir()
    (folder / "sub-link" / "link").symlink_to(outside)
    (folder / "linked").symlink_to(tmp_path)
    (folder / "sub").mkdir()
    assert relocate(folder / STEP, location.format(folder=folder, outside=outside)) > 3
    with refusal(STEP):
        Flow.open(folder).sample(1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("image_size", 4), ("patch_size", 4), ("width", 128), ("layers", 1), ("layers", 3), ("channels", 1)),
        *(("head_dim", 32), ("classes", 900), ("image_size", 2**40)),
    ],
)
def test_a_manifest_that_describes_another_model_ends_in_one_error(key: str, value: object, folder: Path) -> None:
    document = json.loads((folder / MANIFEST).read_bytes())
    document["config"][key] = value
    (folder / MANIFEST).write_text(json.dumps(document))
    labels = [899] if value == 900 else None
    with refusal():
        Flow.open(folder).sample(1, labels=labels)


@pytest.mark.parametrize(
    "said",
    [
        {"image_size": 16_000},
        {"image_size": 2**40},
        {"layers": 2**62},
        {"layers": 1},
        {"classes": 10**9},
        {"classes": 0},
        {"width": 64 * 2**30},
        {"channels": 2**30},
        {"noise_std": 1e160},
    ],
    ids=str,
)
def test_a_model_that_its_weights_do_not_bear_out_is_refused_before_anything_of_its_size_is_made(
    copy: Exported, said: dict[str, Any]
) -> None:
    folder = copy("cond")
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["config"] |= said
    (folder / MANIFEST).write_text(json.dumps(manifest))
    content = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"]["tarflow.config"] = json.dumps(manifest["config"])
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    amend(folder, WEIGHTS)
    with refusal(str(folder), "the configuration says" if "noise_std" not in said else "noise_std"):
        Bundle.open(folder).check_runnable()
