"""Which files are a TarFlow model, what can be read off them, and what must be asked."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tarflow.checkpoint import CONFIG_KEY, CheckpointError, _first_line, load, reference_state, save
from tarflow.cli.messages import spell
from tarflow.config import Config, ConfigError, Hints
from tarflow.model import TarFlow
from tarflow.runtime.errors import InputError

from .conftest import Goldens
from .test_files import Bomb

CONFIG = Config(image_size=8, channels=3, patch_size=2, width=64, blocks=3, layers=2, classes=4, noise_std=0.05)


def state_of(config: Config = CONFIG) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in reference_state(TarFlow(config)).items()}


def write(folder: Path, state: object, name: str = "toy_model_2_64_3_2_0.05.pth") -> Path:
    torch.save(state, folder / name)
    return folder / name


@settings(max_examples=12, deadline=None)
@given(
    st.builds(
        Config,
        image_size=st.sampled_from([4, 8, 12]),
        channels=st.sampled_from([1, 3]),
        patch_size=st.sampled_from([1, 2, 4]),
        width=st.just(64),
        blocks=st.integers(1, 3),
        layers=st.integers(1, 2),
        classes=st.sampled_from([0, 5]),
        nvp=st.booleans(),
        noise_std=st.sampled_from([None, 0.05, 0.3]),
    )
)
def test_any_model_of_the_family_is_read_back_from_shapes_and_file_name(
    tmp_path_factory: pytest.TempPathFactory, config: Config
) -> None:
    model = TarFlow(config)
    for suffix in (".pth", ".safetensors"):
        path = tmp_path_factory.mktemp("model") / config.file_name("toy", suffix)
        save(model, path)
        loaded = load(path)
        assert loaded.config == config
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("name", ["cond", "uncond", "vp"])
def test_a_saved_pth_is_laid_out_as_the_reference_trainer_does(golden: Goldens, tmp_path: Path, name: str) -> None:
    case = golden(name).checkpoint
    save(load(case), tmp_path / case.name)
    theirs, ours = torch.load(case, weights_only=True), torch.load(tmp_path / case.name, weights_only=True)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_the_name_does_not_say_is_asked_for_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path, state_of(), "model.pth")
    for hints, missing in (
        (None, {"patch_size", "noise_std"}),
        (Hints(patch_size=2), {"noise_std"}),
        (Hints(noise_std=0.05), {"patch_size"}),
    ):
        with pytest.raises(ConfigError, match=r"model\.pth") as asked:
            load(path, hints)
        assert set(re.findall(r"`(\w+)`", str(asked.value))) == missing
        assert asked.value.field in missing
        assert set(re.findall(r"--[a-z-]+", spell(asked.value))) == {
            "--" + field.replace("_", "-") for field in missing
        }
    assert load(path, Hints(patch_size=2, noise_std="0.05")).config == CONFIG
    assert load(path, Hints(patch_size=1, noise_std="uniform")).config == replace(
        CONFIG, patch_size=1, channels=12, image_size=4, noise_std=None
    )


def test_a_name_that_speaks_of_another_model_is_told_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, state_of(), "toy_model_1_128_3_2_0.05.pth")
    contradiction = "is the name of a model of width 128, 3 blocks and 2 layers, and the weights are of one of 64, 3, 2"
    with pytest.raises(ConfigError, match=contradiction) as asked:
        load(path)
    assert asked.value.field == "patch_size"
    assert load(path, Hints(2, 0.05)).config == CONFIG
    assert contradiction in caplog.text


@pytest.mark.parametrize(
    ("patch", "found"),
    [(2, "12 channels"), (1, "48 channels"), (3, "no whole number of channels"), (0, "no whole number of channels")],
)
def test_a_name_whose_patches_make_no_picture_is_not_believed_and_the_hint_is(
    patch: int, found: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(CONFIG, image_size=32, patch_size=4)
    path = write(tmp_path, state_of(config), f"toy_model_{patch}_64_3_2_0.05.pth")
    with pytest.raises(ConfigError) as asked:
        load(path)
    assert (asked.value.field, asked.value.exit_code) == ("patch_size", 2)
    for words in (f"names patches of {patch}", found, "model_4_64", "1 (48 channels), 2 (12 channels), 4 (3 channels)"):
        assert words in str(asked.value)
    assert "noise_std" not in str(asked.value)
    assert load(path, Hints(patch_size=4)).config == config
    assert load(path, Hints(patch_size=2)).config == replace(config, image_size=16, patch_size=2, channels=12)
    assert f"names patches of {patch}" in caplog.text


def test_a_model_says_where_its_noise_was_read(tmp_path: Path) -> None:
    for noise, hints, expected in (
        ("0.05", None, "the checkpoint's name, which has two decimals"),
        ("0.125", None, "the checkpoint's name, which has 3 decimals"),
        ("uniform", None, "the checkpoint's name"),
        ("0.05", Hints(noise_std=0.051), "what was said at export"),
    ):
        assert load(write(tmp_path, state_of(), f"toy_model_2_64_3_2_{noise}.pth"), hints).noise_from == expected
    save(TarFlow(CONFIG), tmp_path / "own.safetensors")
    assert load(tmp_path / "own.safetensors").noise_from == "the checkpoint itself"


State = dict[str, torch.Tensor]


def behind(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


WRAPPED: dict[str, Callable[[State], object]] = {
    "half": lambda state: {name: tensor.half() for name, tensor in state.items()},
    "two prefixes": lambda state: {"model": behind("module._orig_mod.", state)},
    "in the other order": lambda state: behind("_orig_mod.module.", state),
    "FSDP": lambda state: {"net": behind("_fsdp_wrapped_module.", state)},
    "inside names": lambda state: {name.replace("blocks.1.", "blocks.1._orig_mod."): t for name, t in state.items()},
    "on some names": lambda state: behind("module.", dict([*state.items()][::2])) | dict([*state.items()][1::2]),
    "Lightning": lambda state: {"state_dict": behind("model.", state) | {"fid.weight": torch.ones(2)}, "epoch": 1},
    "DeepSpeed": lambda state: {"module": state, "optimizer": {"exp_avg": behind("", state)}},
    "deep": lambda state: {"state": {"model_state_dict": state}, "step": 3},
    "averaged alone": lambda state: behind("module.", state) | {"n_averaged": torch.tensor(7)},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_weights_are_found_in_whatever_they_are_wrapped_in(how: str, tmp_path: Path) -> None:
    model = load(write(tmp_path, WRAPPED[how](state_of())))
    assert model.config == CONFIG
    for name, tensor in reference_state(model).items():
        torch.testing.assert_close(tensor, state_of()[name], atol=1e-3, rtol=0)


PAIRS: dict[str, Callable[[State, State], object]] = {
    "model ema": lambda raw, ema: {"model": raw, "ema": ema},
    "net ema_net": lambda raw, ema: {"ema_net": behind("module.", ema), "net": behind("module.", raw)},
    "state_dict.model state_dict.model_ema": lambda raw, ema: {
        "state_dict": behind("model.", raw) | behind("model_ema.", ema) | {"model_ema.decay": torch.tensor(0.9)}
    },
    "online_model ema_model": lambda raw, ema: behind("online_model.", raw) | behind("ema_model.", ema),
    "params EMAModel": lambda raw, ema: {"params": raw, "EMAModel": ema},
}


@pytest.mark.parametrize("places", PAIRS)
def test_of_raw_and_averaged_weights_the_average_is_taken_and_both_are_named(
    places: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ema = {name: tensor + 1 for name, tensor in state_of().items()}
    path, (raw_place, ema_place) = write(tmp_path, PAIRS[places](state_of(), ema)), places.split()
    taken = {wanted: reference_state(load(path, Hints(weights=wanted))) for wanted in (None, "ema", "raw", raw_place)}
    for wanted, expected in {None: ema, "ema": ema, "raw": state_of(), raw_place: state_of()}.items():
        assert all(torch.equal(taken[wanted][name], tensor) for name, tensor in expected.items()), wanted
    (said,) = caplog.messages
    assert f"raw ones in '{raw_place}'" in said
    assert f"took the averaged ones in '{ema_place}'" in said


@pytest.mark.parametrize(
    ("wanted", "keys", "words"),
    [
        ("ema", "net", "`weights` is 'ema'; expected raw or net: "),
        ("best", "net ema", "`weights` is 'best'; expected ema or raw or net or ema: "),
        (None, "ema_9 ema_99 net", "`weights` is not given; expected raw or ema_9 or ema_99 or net: "),
    ],
)
def test_weights_that_are_not_there_or_several_are_refused(
    wanted: str | None, keys: str, words: str, tmp_path: Path
) -> None:
    path = write(tmp_path, {key: state_of() for key in keys.split()})
    with pytest.raises(InputError, match=words) as refused:
        load(path, Hints(weights=wanted))
    assert refused.value.field == "weights"


def test_an_average_without_names_is_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(write(tmp_path, {"model": state_of(), "ema": {"shadow_params": [*state_of().values()], "decay": 0.9}}))
    assert "averages such as 'ema.shadow_params.0'" in caplog.text


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"blocks\.0\.pos_embed is there twice"):
        load(write(tmp_path, state_of() | {"module.blocks.0.pos_embed": torch.zeros(16, 64)}))


@pytest.mark.parametrize("suffix", ["", ".bin", ".ckpt", ".PTH", ".pth.tar", ".pth", ".safetensors"])
def test_the_kind_of_a_file_is_told_by_its_content(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / CONFIG.file_name("toy", suffix)
    for kind in (".pth", ".safetensors"):
        save(TarFlow(CONFIG), tmp_path / f"saved{kind}")
        (tmp_path / f"saved{kind}").replace(path)
        assert load(path).config == CONFIG


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    state, hints, files = state_of(), Hints(2, 0.05), ("a.safetensors", "b.bin")
    names = {name: files[i % 2] for i, name in enumerate(state)}
    save_file({name: tensor for name, tensor in state.items() if names[name] == files[0]}, tmp_path / files[0])
    torch.save({name: tensor for name, tensor in state.items() if names[name] == files[1]}, tmp_path / files[1])
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    for path in (tmp_path, index):
        assert all(torch.equal(state[name], t) for name, t in reference_state(load(path, hints)).items())
    for text in ("", "[]", "{}", '{"weight_map": {"var": "../a.safetensors"}}', '{"weight_map": {"var": "c.bin"}}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            load(tmp_path, hints)


@pytest.mark.parametrize(
    ("hints", "field", "words"),
    [
        (Hints(patch_size=3), "patch_size", "one of 1 (12 channels), 2 (3 channels): these weights have patches of 12"),
        (Hints(patch_size=0), "patch_size", "`patch_size` is 0"),
        (Hints(patch_size=-2), "patch_size", "`patch_size` is -2"),
        (Hints(noise_std="much"), "noise_std", "'uniform'"),
        (Hints(noise_std=-0.1), "noise_std", "`noise_std` is -0.1"),
        (Hints(noise_std="nan"), "noise_std", "`noise_std` is nan"),
        (Hints(noise_std="inf"), "noise_std", "`noise_std` is inf"),
    ],
    ids=str,
)
def test_hints_that_do_not_fit_the_weights_are_refused(hints: Hints, field: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load(write(tmp_path, state_of()), hints)
    assert refused.value.field == field
    assert words in str(refused.value)


BLOCK, LAYER = "blocks.1.", "blocks.0.attn_blocks.0."


@pytest.mark.parametrize("alone", [False, True], ids=["beside ours", "alone"])
@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("STARFlow", ["blocks.0.sos_embed", f"{LAYER}mlp.gate_proj.weight"]),
        ("iTARFlow", ["blocks.0.time_embed.weight", f"{LAYER}adaLN_modulation.1.weight"]),
    ],
)
def test_a_later_family_is_recognised(family: str, names: list[str], alone: bool, tmp_path: Path) -> None:
    theirs = {name: torch.zeros(1, 64) for name in names}
    with pytest.raises(CheckpointError, match=f"(?s){family}.*not supported.*{names[0]}"):
        load(write(tmp_path, theirs if alone else state_of() | theirs))


@pytest.fixture
def small_models_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a model of a billion blocks would be begun: it would take the machine's memory."""

    def build(config: Config) -> TarFlow:
        if config.blocks * config.layers > 1000:
            pytest.fail(f"made a model of {config.blocks} blocks x {config.layers} layers")
        return TarFlow(config)

    monkeypatch.setattr("tarflow.checkpoint.TarFlow", build)


MISSING = [f"{BLOCK}proj_in.bias", "blocks.0.pos_embed", f"{LAYER}mlp.main.2.bias"]
TOO_MANY = ["head.weight", "blocks.0.extra", "blocks.extra.weight", "blocks.x", "blocks.", "blocks.-1.pos_embed"]
TOO_MANY += ["blocks.0.attn_blocks.x.weight", "blocks.0.attn_blocks.", "blocks.1000000000.pos_embed"]
TOO_MANY += ["blocks.0.attn_blocks.1000000000.norm.weight"]
RESHAPED: dict[str, list[tuple[int, ...]]] = {
    f"{BLOCK}pos_embed": [(4, 64)],
    f"{BLOCK}proj_in.bias": [(7,)],
    "blocks.0.proj_in.weight": [(64,), ()],
    "blocks.0.proj_out.bias": [()],
    "blocks.0.proj_out.weight": [(5, 64)],
    f"{LAYER}attention.qkv.weight": [(192, 32)],
    "blocks.0.class_embed": [(), (4, 32)],
    "var": [(1, 1)],
}


@pytest.mark.usefixtures("small_models_only")
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, None) for name in MISSING),
        *((name, (2,)) for name in TOO_MANY),
        *((name, shape) for name, shapes in RESHAPED.items() for shape in shapes),
    ],
)
def test_a_weight_that_is_missing_too_many_or_of_another_shape_is_named(
    name: str, shape: tuple[int, ...] | None, tmp_path: Path
) -> None:
    state = state_of()
    if shape is None:
        del state[name]
    else:
        state[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load(write(tmp_path, state))


def test_a_number_of_patches_that_is_no_square_is_refused(tmp_path: Path) -> None:
    state = state_of()
    state |= {f"blocks.{block}.pos_embed": torch.zeros(15, 64) for block in range(CONFIG.blocks)}
    with pytest.raises(ConfigError, match=r"15 tokens.*square"):
        load(write(tmp_path, state))


@pytest.mark.usefixtures("small_models_only")
def test_a_configuration_that_is_none_is_refused_before_a_model_is_made(tmp_path: Path) -> None:
    path, config = tmp_path / "x.safetensors", CONFIG.to_dict()
    wrong: dict[str, list[object]] = {"blocks": [10**9, "2", 0], "layers": [10**9], "head_dim": [48], "new": [1]}
    wrong |= {"width": [64.0, True], "image_size": [2**30], "noise_std": [1e160, True, "0.1"], "nvp": [1]}
    texts = [json.dumps(config | {name: value}) for name, values in wrong.items() for value in values]
    for text in (*texts, "", "{", "[]", "null", "[" * 100_000, '{"blocks": NaN}'):
        save_file(state_of(), path, {CONFIG_KEY: text})
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            load(path)


def test_a_file_that_says_it_is_far_larger_than_it_is_takes_no_memory(tmp_path: Path) -> None:
    """A bomb of zeros, one number stretched, one large weight under many names."""
    large = torch.zeros(1 << 22)
    bomb = write(tmp_path, {"var": large})
    with zipfile.ZipFile(bomb) as plain:
        members = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    stretched = write(tmp_path, {"blocks.0.pos_embed": torch.zeros(1).expand(1 << 40, 64)}, "stretched.pth")
    shared = write(tmp_path, {f"blocks.{k}.pos_embed": large for k in range(99)}, "shared.pth")
    for path in (bomb, stretched, shared):
        with pytest.raises(CheckpointError, match=r"it has .*iB, and says that it holds .*iB"):
            load(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("container", ["zip", "old", "bare pickle"])
def test_a_pickle_with_code_is_not_run(container: str, protocol: int, tmp_path: Path) -> None:
    path, content = tmp_path / CONFIG.file_name("toy"), {"blocks.0.pos_embed": Bomb(tmp_path / "bomb")}
    if container == "bare pickle":
        path.write_bytes(pickle.dumps(content, protocol))
    else:
        zipped = container == "zip"
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=path.name):
        load(path)
    assert not (tmp_path / "bomb").exists()
    if container == "zip" and protocol == 2:  # shows that the bomb works
        torch.load(path, weights_only=False)
        assert (tmp_path / "bomb").exists()


@pytest.mark.parametrize(
    "content",
    [torch.nn.Linear(2, 2), [torch.zeros(1)], torch.zeros(1), {1: torch.zeros(1)}, b"hello\n" * 50, bytes(999), b"PK"],
    ids=["a whole model", "a list", "a tensor", "numbered tensors", "text", "zeros", "a zip of texts"],
)
def test_what_is_no_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    path = tmp_path / CONFIG.file_name("toy")
    if content == b"PK":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("word/document.xml", "<xml/>")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=path.name) as refused:
        load(path)
    assert isinstance(content, bytes) or "state_dict" in str(refused.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0, 1e-5, 0.001, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_one_clear_error(share: float, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / CONFIG.file_name("toy", suffix)
    save(TarFlow(CONFIG), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError):
        load(path)


@pytest.mark.usefixtures("small_models_only")
@pytest.mark.parametrize("container", ["zip", "old"])
def test_a_checkpoint_with_any_byte_damaged_never_ends_in_a_traceback(container: str, tmp_path: Path) -> None:
    """The pickled names and shapes of a checkpoint, damaged in a hundred places."""
    path, random = tmp_path / CONFIG.file_name("toy"), np.random.default_rng(0)
    torch.save(state_of(), path, _use_new_zipfile_serialization=container == "zip")
    content, pickled = path.read_bytes(), range(3000)
    if container == "zip":
        with zipfile.ZipFile(path) as archive:
            names = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
        start = content.index(names)
        pickled = range(start, start + len(names))
    for position in random.choice(pickled, 100):
        spoiled = bytearray(content)
        spoiled[position] ^= int(random.integers(1, 256))
        path.write_bytes(spoiled)
        with contextlib.suppress(CheckpointError, ConfigError):  # or it loads: not every byte matters
            load(path)


def test_a_text_is_no_checkpoint_rather_than_a_dangerous_one(tmp_path: Path) -> None:
    for name in ("README.md", "notes.pth"):
        (tmp_path / name).write_text("# TarFlow\n\nThis is what it is: a text.\n")
        with pytest.raises(CheckpointError, match="is no PyTorch checkpoint and no safetensors file"):
            load(tmp_path / name)
    (tmp_path / "code.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match="could run code"):
        load(tmp_path / "code.pth")


def test_what_another_library_says_ends_with_a_sentence_or_a_word() -> None:
    long = "PyTorch failed to read the archive of this file. " + "If you can, look at it with a tool for archives " * 3
    assert _first_line(ValueError(long)) == "PyTorch failed to read the archive of this file"
    words = _first_line(ValueError("one word after another " * 9))
    assert words.endswith((" one ...", " word ...", " after ...", " another ..."))
    assert _first_line(ValueError("short")) == "short"
