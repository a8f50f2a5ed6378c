"""Bundles and checkpoints by their place on the hub: the real client, a hub that stands in on loopback."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tarflow.export.pipeline import source_of
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.flow import Flow
from tarflow.runtime.hub import origin

from .conftest import DEMO, GOLDEN, Cli, python, refused, said
from .hub import Hub, environment, files_of, hub_standing_in

CHECKPOINT = next((GOLDEN / "uncond").glob("*.pth"))
Call = Callable[..., Any]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_standing_in() as standing_in:
        readme = {"README.md": b"a model card", ".gitattributes": b"*", "other/huge.bin": b"not of the bundle"}
        standing_in.put("some/digits", {**files_of(DEMO), **readme})
        standing_in.put("some/many", {**files_of(DEMO, "bundles/v0.1/"), CHECKPOINT.name: CHECKPOINT.read_bytes()})
        yield standing_in


@pytest.fixture
def run(hub: Hub, tmp_path: Path, cli: Cli) -> Call:
    """The command, with a cache of this test's."""

    def call(*args: object, offline: bool = False, **variables: str) -> Any:
        env = os.environ | environment(hub, tmp_path / "home", offline) | variables
        return cli(*args, cwd=tmp_path, env=env)

    return call


def test_a_bundle_is_fetched_once_and_opens_where_there_is_no_network(hub: Hub, run: Call, tmp_path: Path) -> None:
    commit = hub.repositories["some/digits"]["main"][0]
    told = said(run("inspect", "hf:some/digits", "--json"))
    assert (told["bundle_hash"], told["origin"]) == (Bundle.open(DEMO).hash, f"hf:some/digits@{commit}")
    assert not [path for path in hub.asked if "huge" in path], "files that the manifest does not name"
    before = len(hub.asked)
    drawn = said(
        run("generate", "hf:some/digits@main", "--n", 2, "-o", "s.png", "--save", "s.npy", "--json", offline=True)
    )
    assert Path(drawn["bundle"]).parts[-2:] == ("snapshots", commit)
    assert said(run("likelihood", f"hf:some/digits@{commit}", "s.npy", "--json"))["images"] == 2
    assert len(hub.asked) == before, "what is there, at a commit that is named, is asked for again"
    shown = run("inspect", "hf:some/digits", offline=True).stdout
    assert re.search(f"came from +hf:some/digits@{commit}\n", shown)


def test_a_checkpoint_and_a_bundle_in_a_folder_are_exported_and_say_where_they_came_from(
    hub: Hub, run: Call, tmp_path: Path
) -> None:
    commit = hub.repositories["some/many"]["main"][0]
    place = f"hf:some/many/{CHECKPOINT.name}"
    said(run("export", place, "-o", "one", "--no-verify", "--no-build", "--json"))
    one = Bundle.open(tmp_path / "one").manifest
    assert (one.source, one.name) == (f"{place}@{commit}", "uncond")
    plan = said(run("export", "hf:some/many/bundles/v0.1@main", "-o", "two", "--dry-run", "--json"))
    assert plan["name"] == "digits"
    assert re.search(f"exported from +{re.escape(place)}@{commit}\n", run("inspect", "one").stdout)
    assert source_of(tmp_path / "one") == one.source, "exported again, it is of the same source"


def test_the_library_opens_a_place(hub: Hub, tmp_path: Path) -> None:
    code = (
        "from tarflow.runtime.flow import Flow\nimport sys\n"
        "flow = Flow.open('hf:some/many/bundles/v0.1')\nprint(flow.bundle.folder)\n"
        "print(flow.sample(2, seed=3).tobytes().hex())"
    )
    done = python("-c", code, env=os.environ | environment(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    folder, drawn = done.stdout.split()
    commit = hub.repositories["some/many"]["main"][0]
    assert origin(Path(folder)) == f"hf:some/many/bundles/v0.1@{commit}"
    assert Path(folder, "weights.safetensors").is_symlink()
    assert bytes.fromhex(drawn) == Flow.open(DEMO).sample(2, seed=3).tobytes()


def test_names_of_classes_and_shards_come_along(hub: Hub, run: Call, tmp_path: Path) -> None:
    weights = (DEMO / "weights.safetensors").read_bytes()
    index = json.dumps({"weight_map": {"every": "part-1.safetensors"}}).encode()
    names = "".join(f"digit {k}\n" for k in range(10)).encode()
    files = {"sub/m.safetensors.index.json": index, "sub/part-1.safetensors": weights}
    commit = hub.put("some/shards", {**files, "m.safetensors": weights, "m.classes.txt": names}, "v1")
    plan = said(run("export", "hf:some/shards/sub/m.safetensors.index.json@v1", "--dry-run", "--json"))
    assert plan["config"]["classes"] == 10
    code = (
        "from tarflow.class_names import class_names_of\nfrom tarflow.runtime.hub import checkpoint_at, origin\n"
        "at = checkpoint_at('hf:some/shards/m.safetensors@v1')\nprint(origin(at), class_names_of(at, 10, None)[3])"
    )
    done = python("-c", code, env=os.environ | environment(hub, tmp_path))
    assert done.stdout == f"hf:some/shards/m.safetensors@{commit} digit 3\n", done.stderr


ABSENT = {
    "hf:some/none": "the hub has no repository 'some/none', or it is private",
    "hf:some/digits@v9": "'some/digits' has no revision 'v9' on the hub; expected a branch, a tag or a commit",
    "hf:some/many/none": "'some/many' has no file 'none",
    "hf:some/many": "'some/many' has no file 'manifest.json' at its main branch; expected a checkpoint or a bundle",
    "hf:digits": "'hf:digits' is no place on the hub; expected hf:OWNER/REPO/FILE",
    "hf:some/many/../x": "'hf:some/many/../x' is no place on the hub",
    "hf:some--x/y": "'hf:some--x/y' is no place on the hub",
}


def test_what_is_not_there_is_said(hub: Hub, run: Call, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom tarflow.runtime.hub import bundle_at, checkpoint_at\n"
        "from tarflow.runtime.errors import InputError\n"
        "for place in sys.argv[1:]:\n"
        "    for at in (bundle_at, checkpoint_at):\n"
        "        try:\n            print(at(place))\n"
        "        except InputError as error:\n            print(error)\n"
    )
    done = python("-c", code, *ABSENT, env=os.environ | environment(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    for k, words in enumerate(ABSENT.values()):
        assert words in told[2 * k]
        assert words in told[2 * k + 1]
    refused(run("generate", "hf:some/none"), 2, ABSENT["hf:some/none"])


def test_without_a_network_or_the_client_a_sentence_says_so(hub: Hub, run: Call, tmp_path: Path) -> None:
    offline = "'manifest.json' of 'hf:some/digits' is not in the hub's cache, and the hub cannot be reached"
    refused(run("generate", "hf:some/digits", offline=True), 3, offline)
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError")
    done = run("likelihood", "hf:some/digits", "x.npy", PYTHONPATH=os.pathsep.join((str(tmp_path), os.getcwd())))
    refused(done, 3, "need huggingface_hub, which is not installed: pip install 'tarflow[hub]'")
