"""A Triton model repository: valid by Triton's own schema, whole or absent, and the Flow's own bits from model.py."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tarflow.runtime.bundle import Bundle
from tarflow.runtime.errors import BundleError, InputError, MachineError
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.opening import Opening
from tarflow.serve.repository import TASKS, Models, Serving, config_text, write_repository

from .conftest import DEMO, GOLDEN, Cli, refused, said
from .triton_double import Model, parsed


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    serving = Serving(instances=2, max_batch=48, opening=Opening(threads=1))
    write_repository(Bundle.open(DEMO), folder, serving, Models())
    return folder


@pytest.fixture(scope="module")
def flow() -> Flow:
    return Flow.open(DEMO)


@pytest.fixture(scope="module")
def model(repository: Path) -> Model:
    return Model(repository / "digits-sample")


def renamed(folder: Path, **config: Any) -> Path:
    """A copy of the demo that says it is another model."""
    shutil.copytree(DEMO, folder)
    manifest = json.loads((DEMO / "manifest.json").read_text())
    manifest["name"], manifest["config"] = "other model", manifest["config"] | config
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def column(*values: float, kind: Any = np.int64) -> NDArray[Any]:
    """One number a sample: (N, 1)."""
    return np.array(values, kind)[:, None]


def request(seed: int, indices: range, label: int | None = None, guidance: float | None = None) -> dict[str, Any]:
    n = len(indices)
    given = {"label": (label, np.int64), "guidance": (guidance, np.float32)}
    tensors = {name: column(*[value] * n, kind=kind) for name, (value, kind) in given.items() if value is not None}
    return {"seed": column(*[seed] * n), "index": column(*indices), **tensors}


def answered(answers: list[dict[str, Any] | str]) -> list[dict[str, Any]]:
    assert not [answer for answer in answers if isinstance(answer, str)]
    return [answer for answer in answers if not isinstance(answer, str)]


def test_the_configuration_says_by_tritons_schema_what_was_asked_for(repository: Path, flow: Flow) -> None:
    for task in TASKS:
        config = parsed((repository / f"digits-{task}" / "config.pbtxt").read_text())
        assert (config.name, config.backend, config.max_batch_size) == (f"digits-{task}", "python", 48)
        assert list(config.dynamic_batching.preferred_batch_size) == [16, 32]
        assert config.dynamic_batching.max_queue_delay_microseconds == 5000
        (group,) = config.instance_group
        assert (group.count, group.kind) == (2, group.KIND_CPU)
        assert config.parameters["bundle_sha256"].string_value == flow.bundle.hash
    serving = Serving(instances=3, max_batch=8, gpus=(0, 2), opening=Opening("auto"))
    config = parsed(config_text("m", "encode", flow.bundle, serving))
    (group,) = config.instance_group
    assert (group.count, group.kind, list(group.gpus)) == (3, group.KIND_GPU, [0, 2])
    assert list(config.dynamic_batching.preferred_batch_size) == []
    inputs = [(i.name, list(i.dims), i.optional) for i in config.input]
    assert inputs == [("images", [1, 8, 8], False), ("label", [1], True)]


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_a_sample_is_the_flows_own_bit_for_bit_in_any_company(model: Model, flow: Flow, guidance: float) -> None:
    wanted = request(7, range(3, 8), label=4, guidance=guidance)
    guided = Guidance(guidance)
    expected = flow.sample(5, labels=4, guidance=guided, seed=7, first_sample=3, reproducible=True, certify=True)
    long, far = request(1, range(100, 117), label=2, guidance=guidance), request(2**62, range(2**40, 2**40 + 1))
    other = request(0, range(4), label=9, guidance=0.25)
    for company in ([wanted], [long, wanted], [long, far, other, wanted], [wanted, other, far, long]):
        answers = answered(model(*company))
        found = answers[[r is wanted for r in company].index(True)]
        np.testing.assert_array_equal(found["images"], expected)
        np.testing.assert_array_equal(found["certificate"][:, 0], expected.certificate)
        np.testing.assert_array_equal(found["log_prob"][:, 0], expected.log_prob)
        assert found["log_prob"].dtype == np.float64


def test_a_repository_that_was_written_before_still_runs(repository: Path, flow: Flow, tmp_path: Path) -> None:
    """With the whole model.py that b0b510c copied into each model, and outputs as they were then."""
    shutil.copytree(repository / "digits-sample", tmp_path / "digits-sample")
    config = tmp_path / "digits-sample" / "config.pbtxt"
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if "log_prob" not in line))
    assert "from tarflow.serve" in (tmp_path / "digits-sample" / "1" / "model.py").read_text()
    shutil.copyfile(GOLDEN / "triton_model_b0b510c.txt", tmp_path / "digits-sample" / "1" / "model.py")
    (found,) = answered(Model(tmp_path / "digits-sample")(request(7, range(3, 8), label=4, guidance=1.5)))
    expected = flow.sample(5, labels=4, guidance=Guidance(1.5), seed=7, first_sample=3, reproducible=True)
    np.testing.assert_array_equal(found["images"], expected)


def test_where_rows_of_a_tile_are_not_independent_each_has_a_tile_of_its_own(repository: Path, flow: Flow) -> None:
    model = Model(repository / "digits-sample")
    assert model.model.shares, "on a CPU they are"
    model.model.shares = False
    first, second = answered(model(request(7, range(2), label=4, guidance=1), request(8, range(5, 7), label=1)))
    expected = flow.sample(2, labels=4, guidance=Guidance(1.0), seed=7, reproducible=True)
    np.testing.assert_array_equal(first["images"], expected)
    expected = flow.sample(2, labels=1, seed=8, first_sample=5, reproducible=True)
    np.testing.assert_array_equal(second["images"], expected)


def test_a_sample_without_label_and_guidance_is_drawn_from_the_null_class(model: Model, flow: Flow) -> None:
    (found,) = answered(model(request(0, range(2)), wanted=("images",)))
    assert found.keys() == {"images"}, "the certificate costs an encoding, so it is computed when asked for"
    (checked,) = answered(model(request(0, range(2)), wanted=("log_prob",)))
    assert (checked["log_prob"] != 0).all(), "for whoever asks for the log-density alone too"
    np.testing.assert_array_equal(found["images"], flow.sample(2, reproducible=True))


def failed_alone(model: Model, flow: Flow, poison: dict[str, Any]) -> str:
    """The error of a request in the midst of others, which are answered as ever."""
    good = request(5, range(3), label=1)
    before, error, after = model(good, poison, good)
    expected = flow.sample(3, labels=1, seed=5, reproducible=True)
    for answer in answered([before, after]):
        np.testing.assert_array_equal(answer["images"], expected)
    assert isinstance(error, str)
    return error


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        (request(0, range(2), label=-2), "label -2 is out of range; this model has classes 0 to 9"),
        (request(0, range(2), label=10), "label 10 is out of range; this model has classes 0 to 9"),
        ({"seed": column(-1), "index": column(0)}, "seed is -1"),
        ({"seed": column(0), "index": column(-5)}, "index is -5"),
        (request(0, range(1), label=1, guidance=-1), "guidance holds"),
        (request(0, range(1), label=1, guidance=float("nan")), "guidance holds"),
        (request(0, range(1), guidance=1), "guidance does nothing for samples without a label"),
    ],
)
def test_a_request_that_cannot_be_answered_fails_alone(model: Model, flow: Flow, poison: Any, message: str) -> None:
    assert message in failed_alone(model, flow, poison)


def test_a_request_the_engine_fails_on_fails_alone(model: Model, flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    run = model.model.run

    def failing(rows: dict[str, Any], certified: bool) -> Any:
        if (rows["label"] == 7).any():
            raise MachineError("out of memory in block 3's step graph")
        return run(rows, certified)

    monkeypatch.setattr(model.model, "run", failing)
    assert failed_alone(model, flow, request(0, range(2), label=7)) == "out of memory in block 3's step graph"


def test_encoding_and_denoising_are_the_flows_and_do_not_depend_on_company(repository: Path, flow: Flow) -> None:
    images = np.asarray(flow.sample(20, labels=np.arange(20) % 10, seed=2, denoise=False))
    labels = column(*(np.arange(20) % 10))
    encode, denoise = (Model(repository / f"digits-{task}") for task in ("encode", "denoise"))

    (whole,) = answered(encode({"images": images, "label": labels}))
    z, log_det = flow.encode(images, labels[:, 0])
    np.testing.assert_allclose(whole["latent"], z, atol=1e-5)
    np.testing.assert_allclose(whole["log_det"][:, 0], log_det, atol=1e-5)
    np.testing.assert_allclose(whole["bits_per_dim"][:, 0], flow.bits_of(z, log_det), atol=1e-4)
    parts = answered(encode(*({"images": images[i : i + 5], "label": labels[i : i + 5]} for i in range(0, 20, 5))))
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)

    strength = column(*[0.5] * 20, kind=np.float32)
    half, full = answered(denoise({"images": images, "label": labels, "strength": strength}, {"images": images}))
    np.testing.assert_allclose(half["images"], flow.denoise(images, labels[:, 0], 0.5), atol=1e-5)
    np.testing.assert_allclose(full["images"], flow.denoise(images), atol=1e-5)
    broken = images[:1] + np.float32(np.inf)
    error, fine = denoise({"images": broken}, {"images": images})
    assert isinstance(error, str)
    assert "not finite" in error
    np.testing.assert_array_equal(answered([fine])[0]["images"], full["images"])


def test_what_is_not_finite_is_an_error_and_floats_of_another_range_are_warned_of_or_refused(repository: Path) -> None:
    encode, denoise = (Model(repository / f"digits-{task}") for task in ("encode", "denoise"))
    images = np.random.default_rng(0).choice([-8, 8], (16, 1, 8, 8)).astype(np.float32)
    for model in (encode, denoise):
        error, fine = model({"images": images}, {"images": images[:1] / 16})
        assert re.match(r"rows 0, 1, .* come to nothing finite", str(error))
        assert np.isfinite(answered([fine])[0].popitem()[1]).all()
        (error,) = model({"images": images[:1] ** 2})
        assert "expected floats in [-1, 1]" in str(error)
        answered(model({"images": images[:1] / 16}, {"images": abs(images[:1]) / 16}))
        assert [list(said) for said in model.said] == [[], ["warning"]]


def test_a_model_refuses_another_bundle_and_a_damaged_one(tmp_path: Path) -> None:
    write_repository(Bundle.open(DEMO), tmp_path, Serving(), Models(("sample",)))
    inside = tmp_path / "digits-sample" / "1" / "bundle"
    weights = bytearray((inside / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (inside / "weights.safetensors").write_bytes(weights)
    with pytest.raises(BundleError, match="damaged or was changed"):
        Model(tmp_path / "digits-sample")
    shutil.rmtree(inside)
    renamed(inside)
    with pytest.raises(BundleError, match=r"config\.pbtxt was written for"):
        Model(tmp_path / "digits-sample")


def test_a_repository_is_whole_or_absent_and_replaces_only_what_is_ours(tmp_path: Path) -> None:
    opened, models = Bundle.open(DEMO), tmp_path / "models"
    (models / "digits-denoise").mkdir(parents=True)
    (models / "digits-denoise" / "precious").write_text("mine")
    for force in (False, True):
        with pytest.raises(InputError, match="`force`"):
            write_repository(opened, models, Serving(), Models(), force)
    assert [p.name for p in models.iterdir()] == ["digits-denoise"], "none of three when one cannot be written"
    write_repository(opened, models, Serving(), Models(("sample",)))
    with pytest.raises(InputError, match="exists; use `force`"):
        write_repository(opened, models, Serving(), Models(("sample",)))
    write_repository(opened, models, Serving(max_batch=4), Models(("sample",)), True)
    assert "max_batch_size: 4\n" in (models / "digits-sample" / "config.pbtxt").read_text()

    damaged = tmp_path / "damaged"
    shutil.copytree(DEMO, damaged)
    (damaged / "golden.safetensors").write_bytes(bytes((DEMO / "golden.safetensors").stat().st_size))
    with pytest.raises(BundleError, match="damaged"):
        write_repository(Bundle.open(damaged), tmp_path / "other", Serving(), Models())
    assert not (tmp_path / "other").exists()


def test_copies_share_the_disk_and_a_link_leads_to_the_bundle(repository: Path, tmp_path: Path, flow: Flow) -> None:
    inodes = {(repository / f"digits-{task}" / "1/bundle/weights.safetensors").stat().st_ino for task in TASKS}
    assert len(inodes) == 1
    assert inodes != {(DEMO / "weights.safetensors").stat().st_ino}, "a copy: the bundle may go"
    write_repository(flow.bundle, tmp_path, Serving(), Models(("sample",), "mine", link=True))
    assert (tmp_path / "mine-sample" / "1" / "bundle").resolve() == DEMO.resolve()
    (found,) = answered(Model(tmp_path / "mine-sample")(request(1, range(2), label=3)))
    np.testing.assert_array_equal(found["images"], flow.sample(2, labels=3, seed=1, reproducible=True))


def test_package_on_the_command_line(tarflow: Cli, tmp_path: Path) -> None:
    found = said(tarflow("package", "--triton", "models", "--instances", 2, "--json"))
    assert found["models"] == ["digits-sample", "digits-encode", "digits-denoise"]
    files = sorted(p.name for p in (tmp_path / "models" / "digits-sample").glob("**/*.p[by]*"))
    assert files == ["config.pbtxt", "model.py"]
    uniform = renamed(tmp_path / "uniform", noise_std=None)
    done = tarflow("package", uniform, "--triton", "models", "--name", "a")
    assert (done.returncode, "a-sample, a-encode in 'models'" in done.stdout) == (0, True), done.stderr
    (tmp_path / "file").touch()
    refused(tarflow("package", uniform, "--triton", "m"), 2, "give another --name")
    for arguments, message in (
        ("", "Pass --triton DIR"),
        ("--triton models", "exists; use --force"),
        ("--triton file", "'file' is a file"),
        ("--triton m --name ../x", "is no model name for Triton"),
        ("--triton m --models dance", "--models is dance; expected some of sample, encode, denoise"),
        ("--triton m --gpu one", "--gpu is 'one'; expected device numbers"),
        ("--triton m --gpu 0,0", "--gpu is 0,0; expected different device numbers"),
        ("--triton m --provider cuda", "--provider cuda needs a GPU: name the devices in --gpu"),
        ("--triton m --threads 0", "--threads is 0"),
        ("--triton m --max-batch 0", "--max-batch is 0"),
    ):
        refused(tarflow("package", DEMO, *arguments.split()), 2, message)
