"""This process: which device it trains on, its place among those that train together, and being asked to stop."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
from torch import Tensor, distributed

from ..runtime.errors import InputError


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N -> a device that is there. Under ``torchrun``, cuda is a GPU for each process.

    Raises InputError if it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not name.startswith("cuda") or not torch.cuda.is_available():
        here = "cpu or cuda" if torch.cuda.is_available() else "cpu: PyTorch sees no CUDA device here"
        raise InputError.of("device", f"'{name}'", here)
    number = os.environ.get("LOCAL_RANK", "0") if name == "cuda" else name.removeprefix("cuda:")
    index = int(number) if number.isdigit() else -1
    if not 0 <= index < torch.cuda.device_count():
        most = f"0 to {torch.cuda.device_count() - 1}, one a process"
        raise InputError(f"no CUDA device {number}; expected {most}", field="device", found=number, expected=most)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among ``world`` of them. Rank 0 writes all files."""

    rank: int = 0
    world: int = 1
    joined: bool = False  # by us; a group that the caller had already stays the caller's

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """Meet the other processes that ``torchrun`` started, or stay alone where it was not used."""
        if distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        if "RANK" not in os.environ or "MASTER_PORT" not in os.environ:
            return cls()
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(minutes=30))  # others wait while rank 0 samples
        return cls(distributed.get_rank(), distributed.get_world_size(), joined=True)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of ``value`` over all processes, in every process."""
        if self.world > 1:
            distributed.all_reduce(value)
            value /= self.world
        return value

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether ``flag`` is set in any process, in every process."""
        return bool(self.mean(torch.tensor(float(flag), device=device))) if self.world > 1 else flag

    def leave(self) -> None:
        if self.joined:
            distributed.destroy_process_group()


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a request to stop after the current step.

    Between steps all weights belong to the same step; an exception in the middle of one would leave a mixture.
    A repeated signal changes nothing: ``torchrun`` passes on what the terminal has already sent.
    """

    requested = False

    def __enter__(self) -> Interrupt:
        allowed = threading.current_thread() is threading.main_thread()  # elsewhere Python has no handlers
        numbers = (signal.SIGINT, signal.SIGTERM) if allowed else ()
        self.previous = {number: signal.signal(number, self.request) for number in numbers}
        return self

    def request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
