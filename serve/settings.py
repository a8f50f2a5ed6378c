"""What a service is told when it starts: bounds on its work, and who may ask."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.errors import InputError


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
    decode: str | None = None
    tolerance: float | None = None
    certify: bool = False  # every sample, asked for or not

    def __post_init__(self) -> None:
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
