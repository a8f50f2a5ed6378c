"""Being asked to end."""

from __future__ import annotations

import signal


def ending() -> tuple[signal.Signals, ...]:
    """The signals that ask a process to end: SIGTERM, and SIGHUP (a closed terminal) unless ``nohup`` is on."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGHUP)
