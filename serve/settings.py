"""What a service is told when it starts: bounds on its work, and who may ask."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..runtime.errors import InputError

ANY_HOST = "*"
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]*)?")


@dataclass(frozen=True, slots=True)
class Settings:
    """Bounds of a service. Times in seconds. Raises InputError for a bound that leaves nothing to serve."""

    queue: int = 64  # requests that may wait; one more is refused
    batch: int = 64  # samples drawn together at most; a request for more is drawn alone
    delay: float = 0.005  # how long a request waits for others before it is drawn with free rows
    workers: int = 1  # batches computed at the same time
    timeout: float = 60.0  # of a request, waiting included
    largest_n: int = 256  # samples or images in a request
    largest_body: int = 64 << 20  # bytes
    token: str | None = None  # what Authorization: Bearer must carry
    allowed_hosts: tuple[str, ...] | None = None  # names in Host, or ANY_HOST; None: whoever asks from any page
    decode: str | None = None
    tolerance: float | None = None
    certify: bool = False  # every sample, asked for or not

    def __post_init__(self) -> None:
        for host in self.allowed_hosts or ():
            if host != ANY_HOST and host_of(host) is None:
                raise InputError.of("allowed_hosts", f"'{host}'", f"a name (tarflow.example), or {ANY_HOST} for any")
        for name in ("queue", "batch", "workers", "largest_n"):
            if getattr(self, name) < 1:
                raise InputError.of(name, getattr(self, name), "1 or more")
        if self.largest_body < 1024:
            raise InputError.of("largest_body", f"{self.largest_body} bytes", "1024 or more")
        if not 0 < self.timeout < 86400:
            raise InputError.of("timeout", f"{self.timeout:g}", "seconds, more than 0 and at most a day")
        if not 0 <= self.delay < self.timeout:
            raise InputError(f"delay is {self.delay:g} s; expected 0 or more, and less than the timeout")
        if self.token is not None and not (8 <= len(self.token) <= 4096 and self.token.isascii()):
            raise InputError("the token is too short, too long or not ASCII; expected 8 to 4096 characters")
        if self.token is not None and any(character.isspace() for character in self.token):
            raise InputError("the token holds spaces or line ends, which no header carries; expected one word")


def host_of(text: str) -> str | None:
    """The name in ``name:port``, in the way that compares; None if there is none."""
    found = _HOST.fullmatch(text.lower())
    return found[1].rstrip(".") if found else None
