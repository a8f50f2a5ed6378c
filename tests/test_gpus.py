"""Which GPU a provider names, and in which sizes and shapes batches reach one."""

from __future__ import annotations

import numpy as np
import pytest

from tarflow.runtime.errors import InputError
from tarflow.runtime.gpus import gpus, numbered
from tarflow.runtime.opening import Opening
from tarflow.runtime.ort.backend import rounded
from tarflow.runtime.spare import Spare

UUID = "8f6d1c2e-0b1a-4c3d-9e8f-001122334455"


@pytest.mark.parametrize(
    ("provider", "name", "device"),
    [
        *(("cpu", "cpu", ""), ("cuda", "cuda", ""), ("cuda:0", "cuda", "0"), ("tensorrt:12", "tensorrt", "12")),
        *((f"cuda:GPU-{UUID}", "cuda", f"GPU-{UUID}"), (f"tensorrt:MIG-{UUID}", "tensorrt", f"MIG-{UUID}")),
        (f"cuda:{UUID[:8]}", "cuda", UUID[:8]),
    ],
)
def test_a_provider_may_name_a_gpu(provider: str, name: str, device: str) -> None:
    opening = Opening(provider)
    assert (opening.provider_name, opening.device) == (name, device)


@pytest.mark.parametrize(
    "provider", ["cpu:0", "auto:1", "cuda:", "cuda:-1", "cuda:one", "cuda:1:2", "cuda: 1", ":1", ""]
)
def test_what_names_no_gpu_is_refused(provider: str) -> None:
    with pytest.raises(
        InputError, match=r"`provider` is '.*'; expected one of auto, native, cpu, cuda, tensorrt; .* cuda:1"
    ):
        Opening(provider)


def test_a_gpu_that_is_not_here_is_refused_with_those_that_are() -> None:
    assert numbered("") == 0
    absent = str(len(gpus()))
    with pytest.raises(InputError, match=f"`provider` is device '{absent}'; expected one of those that CUDA has here"):
        numbered(absent)


def test_where_gpus_are_dealt_out_no_provider_names_one() -> None:
    from tarflow.serve.repository import Serving
    from tarflow.shards.cluster import share

    with pytest.raises(InputError, match=r"`provider` cuda:1 names a device; in a repository `gpus` do that"):
        Serving(gpus=(0,), opening=Opening("cuda:1"))
    with pytest.raises(InputError, match=r"`provider` is 'cuda:1'; expected cuda: Ray gives each worker a GPU"):
        share(1, Opening("cuda:1"), 1)


def test_batches_are_rounded_up_to_a_few_sizes_by_a_third_at_most() -> None:
    sizes = {rounded(images) for images in range(1, 65)}
    assert sorted(sizes) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert all(images <= rounded(images) < 1.5 * images for images in range(1, 2000))


def test_what_does_not_fit_is_kept_while_there_is_room_and_the_last_used_longest() -> None:
    shelf: Spare[np.ndarray[tuple[int], np.dtype[np.uint8]]] = Spare(keep=True, room=10)
    sizes = (1, 2, 3, 4)

    def take(size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        return shelf.take(lambda one: len(one) == size, lambda: np.zeros(size, np.uint8))

    made = {size: take(size) for size in sizes}
    for size in sizes:
        shelf.give(made[size])
    for size in sizes:  # 10 bytes beside the one in use: all are kept
        assert take(size) is made[size]
        shelf.give(made[size])
    large = take(8)  # beside 4, 3, 2 and 1
    shelf.give(large)
    assert take(1) is made[1]
    assert take(2) is not made[2]  # there was room for 8, and none for more
    nothing: Spare[np.ndarray[tuple[int], np.dtype[np.uint8]]] = Spare(keep=True)
    nothing.give(made[1])
    nothing.take(lambda one: False, lambda: made[2])
    assert nothing.take(lambda one: True, lambda: made[3]) is made[3]
