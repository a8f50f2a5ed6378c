"""Classes of images by likelihood: the library, the command, the page's score; and what classes are called."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tarflow.class_names import beside, class_names_of
from tarflow.config import Hints
from tarflow.quality.examine import examine
from tarflow.quality.report import Making, render
from tarflow.quality.scores import score
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.errors import BundleError, InputError
from tarflow.runtime.flow import Flow
from tarflow.runtime.request import Request
from tarflow.runtime.samples import Progress
from tarflow.train.data import digits

from .conftest import DEMO, GOLDEN, Cli, Exported, largest, refused, said
from .serving import calling
from .test_report import Page

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
UNCOND = next((GOLDEN / "uncond").glob("*.pth"))


@pytest.fixture(scope="module")
def some() -> tuple[Any, Any]:
    """Digits that the demo was not trained on, and their classes."""
    held_out = digits().held_out
    assert held_out.labels is not None
    return held_out.images[:30], held_out.labels[:30]


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, with names for its classes."""
    folder = shutil.copytree(DEMO, tmp_path_factory.mktemp("named") / "demo")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"class_names": WORDS}))
    return folder


def pictures(root: Path, images: Any, folders: list[str]) -> Path:
    for i, (image, folder) in enumerate(zip(images, folders, strict=True)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(root / folder / f"{i:03}.png")
    return root


# --- the library ----------------------------------------------------------------------------------------------------


def test_the_probabilities_are_bayes_rule_over_the_likelihoods_of_four_draws(flow: Flow, some: tuple[Any, Any]) -> None:
    images, labels = some
    found = flow.classify(images, seed=5)
    assert (found.classes.tolist(), found.log_likelihoods.shape) == (list(range(10)), (30, 10))
    drawn = flow.dequantise(images.repeat(4, 0), 5)
    by_class = [flow.log_likelihood(drawn, k, (-1, 1)).reshape(30, 4).mean(1) for k in range(10)]
    assert largest(found.log_likelihoods, np.stack(by_class, 1)) < 1e-3
    likelihoods = np.exp(found.log_likelihoods - found.log_likelihoods.max(1, keepdims=True))
    assert largest(found.probabilities, likelihoods / likelihoods.sum(1, keepdims=True)) < 1e-12
    assert (found.ranked()[:, 0] == labels).mean() > 0.9
    assert (np.diff(np.take_along_axis(found.probabilities, found.ranked(), 1)) <= 0).all()


def test_some_classes_are_compared_among_themselves_in_their_order(flow: Flow, some: tuple[Any, Any]) -> None:
    images = some[0][:5].astype(np.float32) / 127.5 - 1
    whole, part = flow.classify(images), flow.classify(images, [7, 2])
    assert part.classes.tolist() == [7, 2]
    assert largest(part.log_likelihoods, whole.log_likelihoods[:, [7, 2]]) < 1e-3
    assert largest(part.probabilities.sum(1), np.ones(5)) < 1e-12
    assert set(part.ranked()[:, 0].tolist()) <= {2, 7}


def test_the_page_scores_a_picture_with_the_same_numbers(flow: Flow, some: tuple[Any, Any]) -> None:
    found, scored = flow.classify(some[0][:1], seed=3), score(flow, some[0][0], 3, lambda now: None)
    assert scored.log_likelihoods is not None
    assert (scored.log_likelihoods == found.log_likelihoods[0]).all()
    assert (scored.probabilities == found.probabilities[0]).all()


def test_it_tells_how_far_it_is_and_can_be_stopped(flow: Flow, some: tuple[Any, Any]) -> None:
    told: list[Progress] = []
    flow.classify(some[0][:2], [1, 2, 3], progress=told.append)
    assert [(now.done, now.total) for now in told] == [(0, 24), (16, 24), (24, 24)]
    with pytest.raises(KeyboardInterrupt):
        flow.classify(some[0], progress=lambda now: (_ for _ in ()).throw(KeyboardInterrupt))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("classes", value) for value in ([], [10], [-1], [1, 1], [[1]], "3", [0.5], [True], [[1], [1, 2]], 3)),
        *(("seed", value) for value in (-1, 2**64, "x", 1.5, None)),
        *(("images", value) for value in (None, "a", [[1, 2], [3]], np.zeros((1, 8, 8), np.uint8))),
        *(("images", np.zeros(shape, np.uint8)) for shape in ((0, 1, 8, 8), (2, 3, 8, 8))),
        *(("images", np.zeros((2, 1, 8, 8), kind)) for kind in (np.int64, complex, bool)),
        ("images", np.full((2, 1, 8, 8), np.nan)),
        ("range", (0, 3)),
        ("range", "0,1"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_field(flow: Flow, field: str, value: object) -> None:
    given = {"images": np.full((2, 1, 8, 8), -0.5, np.float32), field: value}
    with pytest.raises(InputError) as caught:
        flow.classify(**given)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_a_model_without_classes_is_refused(bundle: Exported) -> None:
    flow = Flow.open(bundle("uncond"))
    with pytest.raises(InputError, match="a model with classes: this one is unconditional") as caught:
        flow.classify(np.zeros((1, *flow.config.image), np.uint8))
    assert caught.value.field == "classes"


# --- the command ----------------------------------------------------------------------------------------------------


def test_folders_of_classes_give_the_accuracy(tarflow: Cli, tmp_path: Path, some: tuple[Any, Any]) -> None:
    images, labels = some
    folder = pictures(tmp_path / "in", images, [str(label) for label in labels])
    told = said(tarflow("classify", DEMO, folder, "--top", 2, "--json"))
    order = np.argsort(labels, kind="stable")
    expected = Flow.open(DEMO).classify(images[order])
    assert largest(told["log_likelihoods"], expected.log_likelihoods) < 1e-3
    assert largest(told["probabilities"], expected.probabilities) < 1e-4
    assert (told["classes"], told["labels"]) == (list(range(10)), labels[order].tolist())
    assert told["top"] == expected.ranked()[:, :2].tolist()
    assert told["accuracy"] == (expected.ranked()[:, 0] == labels[order]).mean()
    plain = tarflow("classify", DEMO, folder)
    assert plain.returncode == 0
    first = plain.stdout.splitlines()[0].split()
    assert (first[0], len(first)) == ("0/" + f"{order[0]:03}.png", 1 + 3 * 3)
    assert f"accuracy {100 * told['accuracy']:.1f} % of 30 images" in plain.stdout


def test_an_array_has_no_accuracy_unless_it_is_labelled(tarflow: Cli, some: tuple[Any, Any]) -> None:
    np.save("x.npy", some[0][:4])
    np.save("y.npy", np.array([some[1][0], -1, -1, -1]))
    told = said(tarflow("classify", DEMO, "x.npy", "--classes", "0-4,9", "--json"))
    assert (told["classes"], np.shape(told["top"]), "accuracy" in told) == ([0, 1, 2, 3, 4, 9], (4, 3), False)
    assert said(tarflow("classify", DEMO, "x.npy", "--labels", "y.npy", "--json"))["accuracy"] in (0, 1)
    done = tarflow("classify", DEMO, "x.npy", "--labels", 8, "--classes", "0-4")
    assert "of classes that were not compared count as wrong: [8]" in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--top 0", "--top is 0; expected 1 class or more"),
        ("--classes 0-12", "--classes is a list with 10; expected one or more of 0 to 9"),
        ("--classes 3-1", "classes '3-1' are an empty or endless range"),
        (
            "--classes y.npy",
            "classes 'y.npy' are not understood; expected a class (3), a range (0-9), a list (1,4,7)\n",
        ),
        ("--labels 12", "label 12 is out of range; this model has classes 0 to 9"),
    ],
)
def test_a_slip_is_refused(args: str, words: str, tarflow: Cli) -> None:
    np.save("x.npy", np.zeros((2, 1, 8, 8), np.uint8))
    refused(tarflow("classify", DEMO, "x.npy", *args.split()), 2, words)


def test_images_that_come_to_nothing_are_named_and_no_success(tarflow: Cli) -> None:
    np.save("x.npy", np.random.default_rng(0).choice([-8, 8], (8, 1, 8, 8)).astype(np.float32))
    done = tarflow("classify", DEMO, "x.npy", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 1
    assert told["nonfinite"]
    assert f"check failed: {len(told['nonfinite'])} of 8 images have no finite likelihood" in done.stderr
    assert told["probabilities"][told["nonfinite"][0]] == [None] * 10


# --- what classes are called ----------------------------------------------------------------------------------------


def test_names_are_in_the_manifest_and_told_wherever_classes_are(
    named: Path, tarflow: Cli, tmp_path: Path, some: tuple[Any, Any]
) -> None:
    assert Bundle.open(named).manifest.class_names == WORDS
    assert "class_names" not in Bundle.open(DEMO).manifest.to_json()
    assert "10: zero, one, two" in tarflow("inspect", named).stdout
    folder = pictures(tmp_path / "in", some[0][:6], ["seven", "three"] * 3)  # by name, whatever their order
    told = said(tarflow("classify", named, folder, "--classes", "3,7", "--json"))
    assert (told["class_names"], told["labels"]) == (list(WORDS), [7] * 3 + [3] * 3)
    assert re.search(r"seven/000\.png +\w+ \d+\.\d %  ", tarflow("classify", named, folder).stdout)


@pytest.mark.anyio
async def test_the_report_and_the_server_call_classes_by_their_names(named: Path) -> None:
    flow = Flow.open(named, threads=1)
    found = examine(flow, Request(4, (3, 8)).resolved(flow.config))
    assert "class eight" in Page(render(found, Making("", "", {}))).text
    async with calling(flow) as (client, _):
        assert (await client.get("/v1/model")).json()["class_names"] == list(WORDS)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (7, "'class_names' is int; expected list"),
        (WORDS[:9], "class_names has 9 names; config says 10 classes"),
        ((*WORDS[:9], 9), r"class_names[9] is int; expected str"),
        ((*WORDS[:9], ""), "class_names[9] is ''; expected text without control characters"),
        *(((*WORDS[:9], f"a{bad}b"), "expected text without control characters") for bad in "\n\0\x1b\x7f\x9b\ud800"),
    ],
)
def test_names_that_are_none_are_refused(names: object, words: str, tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "demo")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"class_names": names}))
    with pytest.raises(BundleError, match=re.escape(words)):
        Bundle.open(folder)


def test_export_takes_names_from_a_file_training_or_a_bundle(tarflow: Cli, tmp_path: Path) -> None:
    train = "--image-size 8 --patch-size 4 --width 64 --blocks 1 --layers 1 --steps 1 --batch-size 2 --sample-every 0"
    pictures(tmp_path / "in", digits().train.images[:4], ["cat", "a dog", "cat", "a dog"])
    said(tarflow("train", "--data", "in", "-o", "run", *train.split(), "--channels", 1, "--json"))
    (checkpoint,) = (tmp_path / "run").glob("*.safetensors")
    assert beside(checkpoint).read_text() == "a dog\ncat\n"
    done = tarflow("export", checkpoint, "-o", "learnt", "--no-verify", "--no-build")
    assert "the names of the classes are those in" in done.stderr
    assert Bundle.open("learnt").manifest.class_names == ("a dog", "cat")
    Path("names.txt").write_text("Hund\nKatze ü\n\n")
    said(tarflow("export", "learnt", "-o", "b", "--class-names", "names.txt", "--no-verify", "--no-build", "--json"))
    assert Bundle.open("b").manifest.class_names == ("Hund", "Katze ü")
    assert class_names_of("b", 2, Hints()) == ("Hund", "Katze ü")


@pytest.mark.parametrize(
    ("checkpoint", "content", "words"),
    [
        (DEMO, b"one\ntwo\n", "'names.txt', with 2 lines; expected a file with a name a line in UTF-8, 10 in all"),
        (DEMO, b"a\n\xff", "'names.txt', which is not UTF-8"),
        (DEMO, b"a\n\n" + b"b\n" * 8, "'names.txt', whose line 2 is ''; expected text on every line"),
        (DEMO, None, "'names.txt', which cannot be read (No such file"),
        (UNCOND, b"a\n", "10 in all".replace("10", "0") + ": this model is unconditional"),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_file_without_the_names_is_refused_before_the_work(
    checkpoint: Path, content: bytes | None, words: str, dry: list[str], tarflow: Cli, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    message = refused(tarflow("export", checkpoint, "-o", "b", "--class-names", "names.txt", *dry), 2, words)
    assert "--class-names is" in message
