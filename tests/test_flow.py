"""What a Flow promises: the same sample whoever draws it, honest reports, nothing silently wrong."""

from __future__ import annotations

import gc
import json
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tarflow.runtime import noise
from tarflow.runtime.backend import Branches
from tarflow.runtime.bundle import Bundle
from tarflow.runtime.errors import BundleError, InputError, MachineError, TarflowError
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.image import patchify
from tarflow.runtime.inputs import integers
from tarflow.runtime.opening import Opening
from tarflow.runtime.ort.stepwise import StepwiseDecoding
from tarflow.runtime.request import Request
from tarflow.runtime.samples import Preview, Progress

from .conftest import DEMO, Exported, Goldens, largest, report_of

GUIDED = Guidance(1.5)


@pytest.fixture(scope="module")
def flow(bundle: Exported) -> Flow:
    return Flow.open(bundle("cond"))


def test_a_report_names_the_level_that_holds(flow: Flow, bundle: Exported) -> None:
    graphs = Flow.open(bundle("cond"), "cpu")
    for engine, reproducible, level in ((graphs, False, "L2"), (graphs, True, "L1"), (flow, False, "L1")):
        assert report_of(engine.sample(2, labels=1, reproducible=reproducible)).level.startswith(level)


def test_with_the_least_memory_one_block_is_open_at_a_time(bundle: Exported) -> None:
    small = Flow.open(bundle("cond"), "cpu", memory="least")
    small.sample(5, labels=1)
    assert len({key[0] for key in small.backend.sessions._open}) == 1  # type: ignore[attr-defined]


def test_a_request_is_checked_once_and_its_parts_are_not(flow: Flow) -> None:
    """Guidance works on some of these samples: a part in which it does nothing is drawn with the rest's guidance."""
    request = Request(6, labels=(1, -1), guidance=GUIDED, seed=3).resolved(flow.config)
    whole = flow.draw(request)
    parts = [flow.draw(request.part(first, 1)) for first in range(6)]
    assert largest(np.concatenate(parts), whole) < 1e-5
    assert largest(whole, flow.sample(6, labels=[1, -1] * 3, guidance=GUIDED, seed=3)) == 0
    assert request.part(3, 3).classes().tolist() == [-1, 1, -1]
    with pytest.raises(InputError, match="does nothing"):
        Request(2, labels=(-1,), guidance=GUIDED).resolved(flow.config)


def test_an_opened_bundle_and_a_whole_opening_may_be_given(bundle: Exported) -> None:
    assert Flow.open(Bundle.open(bundle("cond")), Opening(threads=1)).backend.machine.endswith("1 threads")
    with pytest.raises(InputError, match="drop `threads`"):
        Flow.open(bundle("cond"), Opening(), threads=2)
    for wrong in ({"threads": 0}, {"memory": "little"}, {"memory": 0}, {"provider": "ort-tensorrt"}):
        with pytest.raises(InputError, match=f"`{next(iter(wrong))}`"):
            Flow.open(bundle("cond"), **wrong)


def test_an_unguided_certificate_and_the_gradient_share_one_encoding(
    bundle: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = Flow.open(bundle("cond"))
    expected = flow.sample(3, labels=1)
    encoded: list[int] = []
    forward = flow.backend.forward

    def counting(block: int, *inputs: Any) -> tuple[Any, Any]:
        encoded.append(block)
        return forward(block, *inputs)

    monkeypatch.setattr(flow.backend, "forward", counting)
    assert np.array_equal(flow.sample(3, labels=1, certify=True), expected)
    assert encoded == list(range(flow.config.blocks))
    flow.sample(3, labels=1, certify=True, guidance=GUIDED)
    assert len(encoded) == 3 * flow.config.blocks


def test_a_label_below_zero_and_no_label_are_the_null_class(flow: Flow) -> None:
    assert np.array_equal(flow.sample(3, labels=-1), flow.sample(3))
    assert largest(flow.sample(3, labels=2), flow.sample(3)) > 1e-3


def test_given_noise_gives_the_sample_its_seed_gives(flow: Flow) -> None:
    noise = flow.noise(5, range(10, 14))
    assert np.array_equal(flow.sample(noise=noise, labels=1), flow.sample(4, labels=1, seed=5, first_sample=10))


def test_a_report_names_samples_that_overflow_and_those_that_were_redrawn(demo: Path) -> None:
    flow = Flow.open(demo)
    how: dict[str, Any] = {"labels": np.arange(24) % 10, "guidance": Guidance(40.0), "denoise": False}
    plain, again = (flow.sample(24, **how, redraw_nonfinite=on) for on in (False, True))
    broken, left = (np.flatnonzero(~np.isfinite(drawn).all((1, 2, 3))) for drawn in (plain, again))
    assert len(broken) > len(left), "guidance of 40 must overflow somewhere, or this test shows nothing"
    assert report_of(plain).nonfinite == tuple(broken)
    assert set(report_of(again).redrawn) == set(broken)
    assert report_of(again).nonfinite == tuple(left)


def test_progress_counts_every_step_and_previews_show_every_tile_after_every_block(flow: Flow) -> None:
    seen: list[Preview] = []
    steps: list[Progress] = []
    how: dict[str, Any] = {"labels": 1, "first_sample": 14, "guidance": GUIDED, "reproducible": True}
    drawn = flow.sample(5, **how, denoise=False, preview=seen.append, progress=steps.append)
    assert [(p.done, p.total) for p in steps] == [(done, 2 * 4 * 15) for done in range(1, 2 * 4 * 15 + 1)]
    assert [p.block for p in seen] == [3, 2, 1, 0] * 2
    assert [p.first for p in seen] == [14] * 4 + [16] * 4
    assert [len(p.images) for p in seen] == [2] * 4 + [3] * 4
    assert 0 < sum(p.seconds for p in seen) < report_of(drawn).seconds
    assert np.array_equal(np.concatenate([p.images for p in seen if p.block == 0]), drawn)
    assert not np.array_equal(flow.sample(5, **how, preview=seen.append), drawn)
    assert np.array_equal(seen[-1].images, seen[7].images), "what is shown is never denoised"


def test_noise_of_the_next_batch_is_made_before_the_last_steps_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, made = Flow.open(DEMO, provider="cpu"), list[str]()

    def noting(name: str, usual: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            made.append(name)
            return usual(*arguments)

        return noted

    monkeypatch.setattr(noise, "normal", noting("noise", noise.normal))
    monkeypatch.setattr(StepwiseDecoding, "patches", noting("patches", StepwiseDecoding.patches))
    whole = flow.sample(5, labels=0, seed=7, decode="serial", batch_size=2)
    blocks = ["patches"] * flow.config.blocks
    assert made == ["noise", *blocks[1:], "noise", "patches", *blocks[1:], "noise", "patches", *blocks]
    assert largest(whole, flow.sample(5, labels=0, seed=7, decode="serial")) < 1e-5


def test_a_preview_inverts_the_blocks_one_by_one(flow: Flow) -> None:
    """Encoding what is seen after a block with that block alone gives what was seen before it."""
    seen: list[Preview] = []
    flow.sample(3, labels=2, preview=seen.append)
    plain = Branches.plain(np.full(3, 2), flow.config.tokens)
    for before, after in pairwise(seen):
        found, _ = flow.backend.forward(after.block, patchify(after.images, flow.config.patch_size), plain)
        assert largest(found, patchify(before.images, flow.config.patch_size)) < 1e-4


def test_a_preview_can_cancel(flow: Flow) -> None:
    blocks = [3]
    with pytest.raises(ValueError, match="not in list"):
        flow.sample(2, labels=1, preview=lambda preview: blocks.remove(preview.block))
    assert not blocks


def test_likelihood_is_the_formula_of_the_paper(golden: Goldens, flow: Flow) -> None:
    case = golden("cond")
    z, log_det = case.vectors["forward.z"].astype(np.float64), case.vectors["forward.logdet"]
    nats = (log_det - (0.5 * z**2 + 0.5 * np.log(2 * np.pi)).mean((1, 2))) * z[0].size
    assert largest(flow.log_likelihood(case.vectors["images"], case.labels), nats) < 1e-2
    bits = (np.log(128) - nats / z[0].size) / np.log(2)
    assert largest(flow.bits_per_dim(case.vectors["images"], case.labels), bits) < 1e-5


def test_eight_bit_images_get_the_noise_of_training(flow: Flow) -> None:
    images = np.random.default_rng(0).integers(0, 256, (200, 3, 8, 8)).astype(np.uint8)
    noisy = flow.dequantise(images, seed=3)
    assert abs((noisy - (images / 127.5 - 1)).std() - 0.07) < 1e-3
    assert np.array_equal(noisy[5:9], flow.dequantise(images[5:9], seed=3, first_sample=5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "`n` is 0"),
        ({"n": -3}, "`n` is -3"),
        ({}, "nothing to draw"),
        ({"n": 2, "labels": 5}, "classes 0 to 4"),
        ({"n": 2, "labels": [0, -2]}, "label -2 is out of range; this model has classes 0 to 4, and -1 for none"),
        ({"n": 2, "labels": np.array([0, 2**63], np.uint64)}, "label 9223372036854775808 is out of range"),
        ({"n": 2, "labels": [1, 2, 3]}, "shape"),
        ({"n": 2, "labels": 1.5}, "integers"),
        ({"noise": np.zeros((2, 16, 11))}, "shape"),
        ({"noise": np.full((2, 16, 12), np.nan)}, "not finite"),
        ({"noise": np.zeros((0, 16, 12))}, "shape"),
        ({"n": 3, "noise": np.zeros((2, 16, 12))}, "drop one"),
        ({"n": 2, "guidance": Guidance(1.0)}, "does nothing"),
        ({"n": 2, "batch_size": 0}, "`batch_size` is 0"),
        ({"n": 2, "seed": -1}, "`seed` is -1"),
        ({"n": 2, "first_sample": -1}, "`first_sample` is -1"),
        ({"n": 2, "denoise": -1.0}, "strength"),
        ({"noise": np.zeros((2, 16, 12)), "redraw_nonfinite": True}, "redrawn"),
        ({"n": 1, "decode": "quick"}, "`decode` is 'quick'; expected one of serial, exact, fast"),
        ({"n": 1, "tolerance": -1.0}, "`tolerance` is -1.0"),
        ({"n": 1, "tolerance": float("nan")}, "`tolerance` is nan"),
        ({"n": 1, "decode": "serial", "tolerance": 1e-3}, "`tolerance` is 0.001; expected none with `decode` serial"),
    ],
)
def test_what_cannot_be_meant_is_refused(flow: Flow, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        flow.sample(**arguments)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", ["3", 2.0, True, [2]]),
        ("noise", ["noise", [[1], [2, 3]]]),
        ("labels", ["three", 1.5, [1, [2]], True]),
        ("guidance", ["strong", True, (1, "ab")]),
        ("seed", ["7", 7.0, True, [7], None]),
        ("first_sample", ["7", 0.5, True, None]),
        ("denoise", ["yes", [1.0]]),
        ("certify", ["yes", 1, None]),
        ("redraw_nonfinite", ["yes", 1, None]),
        ("reproducible", ["yes", 1, None]),
        ("decode", [5, True]),
        ("tolerance", ["1e-3", True]),
        ("batch_size", ["8", 8.0, True]),
        ("progress", [5, "bar"]),
        ("preview", [5]),
    ],
)
def test_a_value_of_a_wrong_type_is_an_input_error_with_its_field(flow: Flow, field: str, values: list[Any]) -> None:
    for value in values:
        given: dict[str, Any] = {"n": 2, field: value}
        if field == "noise":
            del given["n"]
        with pytest.raises(InputError, match=f"`{field}` is ") as refused:
            flow.sample(**given)
        assert refused.value.field == field
        assert isinstance(refused.value, ValueError)


def test_wrong_types_are_refused_by_every_other_method_too(flow: Flow, bundle: Exported) -> None:
    images: Any = np.full((2, 3, 8, 8), -0.5, np.float32)
    wrong: list[tuple[str, Callable[[], object]]] = [
        ("bundle", lambda: Flow.open(5)),  # type: ignore[arg-type]
        ("provider", lambda: Flow.open(bundle("cond"), 5)),  # type: ignore[arg-type]
        ("threads", lambda: Flow.open(bundle("cond"), threads=1.5)),  # type: ignore[arg-type]
        ("memory", lambda: Flow.open(bundle("cond"), memory=1.5)),  # type: ignore[arg-type]
        ("spinning", lambda: Flow.open(bundle("cond"), spinning="no")),  # type: ignore[arg-type]
        ("cuda_graph", lambda: Flow.open(bundle("cond"), cuda_graph=0)),  # type: ignore[arg-type]
        ("precision", lambda: Flow.open(bundle("cond"), "native", precision=8)),  # type: ignore[arg-type]
        ("images", lambda: flow.encode("picture.png")),
        ("images", lambda: flow.encode([[1], [2, 3]])),
        ("labels", lambda: flow.encode(images, "three")),
        ("range", lambda: flow.encode(images, range=[0, 1])),  # type: ignore[arg-type]
        ("strength", lambda: flow.denoise(images, strength="full")),  # type: ignore[arg-type]
        ("guidance", lambda: flow.certify(images, flow.noise(0, range(2)), guidance="strong")),  # type: ignore[arg-type]
        ("images", lambda: flow.dequantise(images)),
        ("seed", lambda: flow.dequantise(images.astype(np.uint8), seed="7")),  # type: ignore[arg-type]
        ("first_sample", lambda: flow.dequantise(images.astype(np.uint8), first_sample=0.5)),  # type: ignore[arg-type]
        ("request", lambda: flow.draw(5)),  # type: ignore[arg-type]
        ("samples", lambda: flow.noise(0, 5)),  # type: ignore[arg-type]
        ("seed", lambda: flow.noise("7", [5])),  # type: ignore[arg-type]
        ("seed", lambda: flow.noise(1.5, [5])),  # type: ignore[arg-type]
        ("seed", lambda: flow.noise(None, [5])),  # type: ignore[arg-type]
        ("seed", lambda: flow.classify(images, seed=None)),  # type: ignore[arg-type]
        ("scale", lambda: Guidance("1")),  # type: ignore[arg-type]
        ("what", lambda: Guidance(1.0, 5)),  # type: ignore[arg-type]
        ("annealed", lambda: Guidance(1.0, annealed="yes")),  # type: ignore[arg-type]
        ("attention_temperature", lambda: Guidance(1.0, attention_temperature=None)),  # type: ignore[arg-type]
    ]
    for field, call in wrong:
        with pytest.raises(InputError, match=f"`{field}` is ") as refused:
            call()
        assert refused.value.field == field
    with pytest.raises(TypeError, match="unexpected keyword argument 'sede'"):
        flow.sample(2, sede=None)  # type: ignore[call-overload]


@pytest.mark.parametrize("given", ["a.png", None, Path("a.png"), b"a"])
def test_what_is_no_array_of_images_is_named_as_it_was_given(flow: Flow, given: Any) -> None:
    for verb in (flow.encode, flow.denoise, flow.log_likelihood, flow.bits_per_dim, flow.classify, flow.dequantise):
        with pytest.raises(InputError, match=r"an array of images, \(N, channels, size, size\); read") as refused:
            verb(given)
        assert (refused.value.field, refused.value.found) == ("images", repr(given))


def test_a_class_that_is_no_number_is_told_the_names_and_numbers_there_are(flow: Flow) -> None:
    names = ("cat", "dog", "emu", "fox", "gnu")
    named = Flow(replace(flow.bundle, manifest=replace(flow.bundle.manifest, class_names=names)), flow.backend)
    assert (named.class_names, flow.class_names) == (names, ())
    images = np.full((2, *flow.config.image), -0.5, np.float32)
    known, said = "integers: 0 cat, 1 dog, 2 emu, 3 fox, 4 gnu", list[InputError]()
    for call in (
        lambda: named.sample(2, labels="cats"),
        lambda: named.encode(images, ["cat", "dog"]),
        lambda: named.denoise(images, "cats"),
        lambda: named.classify(images, "cats"),
        lambda: named.classify(images, ["cat"]),
    ):
        with pytest.raises(InputError) as refused:
            call()
        assert (refused.value.expected or "").endswith(known)
        said.append(refused.value)
    assert [error.found for error in said] == ["'cats'", "['cat', 'dog']", "'cats'", "'cats'", "['cat']"]
    with pytest.raises(InputError, match=r"`labels` is 'cats'; expected integers$"):
        flow.sample(2, labels="cats")
    assert integers([str(k) for k in range(1000)]).endswith("19 19, ... 999 999")


def test_errors_carry_the_field_as_it_was_written_what_was_found_and_what_was_expected(
    flow: Flow, bundle: Exported, tmp_path: Path
) -> None:
    noise, images = flow.noise(0, range(2)), np.full((2, *flow.config.image), np.nan, np.float32)
    closed = Flow.open(bundle("cond"))
    closed.close()
    wrong: list[tuple[str, object, Callable[[], object]]] = [
        ("guidance", -1, lambda: flow.sample(2, labels=1, guidance=-1)),
        ("guidance", 1.0, lambda: flow.sample(2, guidance=1.0)),
        ("attention_temperature", 0.5, lambda: flow.sample(2, guidance=Guidance(0, attention_temperature=0.5))),
        ("n", "nothing", lambda: flow.sample()),
        ("labels", 3, lambda: Flow.open(bundle("uncond")).sample(2, labels=[-1, 3])),
        ("redraw_nonfinite", True, lambda: flow.sample(noise=noise, redraw_nonfinite=True)),
        ("images", "not finite in 2 of 2 rows", lambda: flow.encode(images)),
        ("flow", "closed", lambda: closed.sample(1)),
        ("bundle", str(tmp_path / "none"), lambda: Flow.open(tmp_path / "none")),
        ("bundle", str(tmp_path), lambda: Flow.open(tmp_path)),
        ("threads", "given beside an Opening", lambda: Flow.open(bundle("cond"), Opening(), threads=2)),
    ]
    for field, found, call in wrong:
        with pytest.raises(TarflowError) as refused:
            call()
        assert (refused.value.field, refused.value.found) == (field, found)
        assert refused.value.expected


def test_python_is_told_the_way_in_and_the_keywords_there_are(flow: Flow, bundle: Exported) -> None:
    with pytest.raises(TypeError, match=r"Flow\.open\(bundle\)"):
        Flow(bundle("cond"))  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"Flow.open\(\) .* argument 'device'; it has bundle, provider, threads, .*memory"
    ):
        Flow.open(bundle("cond"), device="cpu")  # type: ignore[call-arg]
    with pytest.raises(
        TypeError, match=r"Flow.sample\(\) .* argument 'foo'; it has n, certify, guidance, seed.* labels"
    ):
        flow.sample(2, foo=1)  # type: ignore[call-overload]


def test_a_number_is_a_guidance_and_numpy_s_numbers_are_numbers(flow: Flow) -> None:
    expected = flow.sample(2, labels=1, guidance=Guidance(1.5), seed=3)
    assert np.array_equal(flow.sample(2, labels=1, guidance=1.5, seed=3), expected)
    how: dict[str, Any] = {"guidance": np.float32(1.5), "seed": np.uint64(3), "certify": np.True_}
    assert np.array_equal(flow.sample(np.int64(2), labels=np.int8(1), **how), expected)  # type: ignore[call-overload]
    raw, noise = flow.sample(2, labels=1, guidance=1.5, denoise=False), flow.noise(0, range(2))
    assert flow.certify(raw, noise, 1, 1.5).max() < 1e-4


def test_a_flow_says_what_it_is_and_closes(bundle: Exported) -> None:
    with Flow.open(bundle("cond")) as flow:
        assert repr(flow).startswith("<Flow of 'cond', fp32, on ")
        engine = weakref.ref(flow.backend)
        assert flow.sample(1).shape == (1, 3, 8, 8)
    gc.collect()
    assert engine() is None, "it is let go of"
    assert repr(flow).endswith("on nothing, as it was closed>")
    images = np.full((1, 3, 8, 8), -0.5)
    for use in (lambda: flow.sample(1), lambda: flow.encode(images), lambda: flow.denoise(images)):
        with pytest.raises(InputError, match="this flow was closed; open the bundle again"):
            use()
    flow.close()
    assert flow.noise(0, [1]).shape == (1, 16, 12), "which needs no engine"


def test_a_flow_pickles_as_what_opens_the_same_bundle_again(
    copy: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy("cond").parent)
    flow = Flow.open(Path("cond-fp32"), threads=1)
    kept, expected = pickle.dumps(flow), flow.sample(2, labels=1)
    assert len(kept) < 2000, "no weights"
    monkeypatch.chdir("/")
    again = pickle.loads(kept)
    assert (again.opening, again.bundle.hash) == (Opening(threads=1), flow.bundle.hash)
    assert np.array_equal(again.sample(2, labels=1), expected)
    manifest = json.loads((tmp_path / "cond-fp32" / "manifest.json").read_text())
    (tmp_path / "cond-fp32" / "manifest.json").write_text(json.dumps(manifest, indent=3))
    with pytest.raises(BundleError, match="is another bundle than it was"):
        pickle.loads(kept)
    with pytest.raises(TypeError, match="nothing says how to open it again"):
        pickle.dumps(Flow(flow.bundle, flow.backend))


@pytest.mark.parametrize("wrong", [{"scale": -1}, {"scale": float("nan")}, {"what": "c"}, {"attention_temperature": 0}])
def test_guidance_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Guidance(**wrong)  # type: ignore[arg-type]


def test_guidance_of_an_unconditional_model_needs_a_temperature(bundle: Exported) -> None:
    flow = Flow.open(bundle("uncond"))
    with pytest.raises(InputError, match="does nothing"):
        flow.sample(2, guidance=Guidance(1.0))
    assert largest(flow.sample(2, guidance=Guidance(1.0, attention_temperature=0.5)), flow.sample(2)) > 1e-4
    with pytest.raises(InputError, match="unconditional"):
        flow.sample(2, labels=0)


def test_a_provider_that_is_not_here_is_an_error_that_says_what_to_install(bundle: Exported) -> None:
    with pytest.raises(MachineError, match="onnxruntime-gpu"):
        Flow.open(bundle("cond"), provider="cuda")
    with pytest.raises(InputError, match="`provider` is 'abacus'"):
        Flow.open(bundle("cond"), provider="abacus")
    assert "CPU" in Flow.open(bundle("cond"), provider="auto").backend.description
