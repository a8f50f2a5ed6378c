"""Which files are a TarFlow model, what can be read off them, and what must be asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tarflow.checkpoint import CheckpointError, load, reference_state, save
from tarflow.config import Config, ConfigError, Hints
from tarflow.model import TarFlow

from .conftest import Golden

CONFIG = Config(image_size=8, channels=3, patch_size=2, width=64, blocks=3, layers=2, classes=4, noise_std=0.05)


def state_of(config: Config = CONFIG) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in reference_state(TarFlow(config)).items()}


def write(folder: Path, state: object, name: str = "toy_model_2_64_3_2_0.05.pth") -> Path:
    torch.save(state, folder / name)
    return folder / name


@settings(max_examples=12, deadline=None)
@given(
    patch=st.sampled_from([1, 2, 4]),
    grid=st.integers(1, 3),
    channels=st.sampled_from([1, 3]),
    blocks=st.integers(1, 3),
    layers=st.integers(1, 2),
    classes=st.sampled_from([0, 5]),
    nvp=st.booleans(),
    noise=st.sampled_from([None, 0.05, 0.3]),
)
def test_any_model_of_the_family_is_read_back_from_shapes_and_file_name(
    tmp_path_factory: pytest.TempPathFactory,
    patch: int,
    grid: int,
    channels: int,
    blocks: int,
    layers: int,
    classes: int,
    nvp: bool,
    noise: float | None,
) -> None:
    config = Config(patch * grid, channels, patch, 64, blocks, layers, classes, nvp, noise)
    model = TarFlow(config)
    for suffix in (".pth", ".safetensors"):
        path = tmp_path_factory.mktemp("model") / config.file_name("toy", suffix)
        save(model, path)
        loaded = load(path)
        assert loaded.config == config
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)


def test_the_reference_names_round_trip(golden: Callable[[str], Golden]) -> None:
    for case in ("cond", "uncond", "vp"):
        stored = torch.load(golden(case).checkpoint, weights_only=True)
        stored = {name: tensor for name, tensor in stored.items() if not name.endswith("attn_mask")}
        ours = reference_state(load(golden(case).checkpoint))
        assert ours.keys() == stored.keys()
        assert all(torch.equal(ours[name], stored[name]) for name in stored)


def test_a_saved_pth_is_laid_out_as_the_reference_trainer_does(golden: Callable[[str], Golden], tmp_path: Path) -> None:
    case = golden("cond").checkpoint
    save(load(case), tmp_path / case.name)
    theirs, ours = torch.load(case, weights_only=True), torch.load(tmp_path / case.name, weights_only=True)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_the_name_does_not_say_is_asked_for_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path, state_of(), "model.pth")
    with pytest.raises(ConfigError) as both:
        load(path)
    assert "`patch_size`" in str(both.value)
    assert "`noise_std`" in str(both.value)
    with pytest.raises(ConfigError) as one:
        load(path, Hints(patch_size=2))
    assert "patch_size" not in str(one.value)
    assert one.value.field == "noise_std"
    assert load(path, Hints(patch_size=2, noise_std="0.05")).config == CONFIG
    assert load(path, Hints(patch_size=1, noise_std="uniform")).config == replace(
        CONFIG, patch_size=1, channels=12, image_size=4, noise_std=None
    )
    with pytest.raises(ConfigError, match="12"):
        load(path, Hints(patch_size=3, noise_std=0.05))
    with pytest.raises(ConfigError, match="expected a number, or 'uniform'"):
        load(path, Hints(patch_size=2, noise_std="loud"))


def test_a_name_that_speaks_of_another_model_is_not_trusted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`patch_size`"):
        load(write(tmp_path, state_of(), "toy_model_1_128_3_2_0.05.pth"))


def test_wrapped_and_half_precision_state_dicts_load(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor.half() for name, tensor in state_of().items()}
    model = load(write(tmp_path, {"model": state}))
    assert model.config == CONFIG
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s.pop("blocks.1.attn_blocks.0.mlp.main.2.bias"),
            ["missing", "blocks.1.attn_blocks.0.mlp.main.2.bias"],
        ),
        (lambda s: s.update({"blocks.0.extra": torch.zeros(1)}), ["not part of TarFlow", "blocks.0.extra"]),
        (lambda s: s.pop("blocks.0.pos_embed"), ["missing", "blocks.0.pos_embed"]),
        (lambda s: s.update({"blocks.0.sos_embed": torch.zeros(1)}), ["STARFlow", "sos_embed"]),
        (
            lambda s: s.update({"blocks.0.attn_blocks.0.mlp.gate_proj.weight": torch.zeros(1)}),
            ["STARFlow", "gate_proj"],
        ),
        (lambda s: s.update({"blocks.0.time_embed.weight": torch.zeros(1)}), ["iTARFlow", "time_embed"]),
        (lambda s: s.update({"blocks.2.proj_in.bias": torch.zeros(7)}), ["blocks.2.proj_in.bias", "(7,)", "(64,)"]),
        (lambda s: s.clear(), ["missing"]),
    ],
)
def test_foreign_files_are_refused_by_what_is_missing_or_extra(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], words: list[str]
) -> None:
    state = state_of()
    change(state)
    with pytest.raises(CheckpointError) as refused:
        load(write(tmp_path, state))
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "sprung",)

    with pytest.raises(CheckpointError, match="run code"):
        load(write(tmp_path, {"weights": Trap()}))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 1000, -100])
def test_a_truncated_file_is_one_clear_error(tmp_path: Path, suffix: str, keep: int) -> None:
    path = tmp_path / CONFIG.file_name("toy", suffix)
    save(TarFlow(CONFIG), path)
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    with pytest.raises(CheckpointError):
        load(path)
