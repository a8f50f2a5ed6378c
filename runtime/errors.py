"""What goes wrong, by who can mend it. Every message says what was found, what was expected, what to do next."""

from __future__ import annotations


class TarflowError(Exception):
    """Any error this package raises on purpose. ``exit_code`` is what the command line returns."""

    exit_code = 1


class CheckFailed(TarflowError):
    """A result was computed and found outside its tolerance."""

    exit_code = 1


class InputError(TarflowError, ValueError):
    """The caller asked for something that cannot be done: a label, a shape, a number out of range."""

    exit_code = 2


class MachineError(TarflowError):
    """The machine lacks something: a package, a provider, memory, disk."""

    exit_code = 3


class BundleError(TarflowError):
    """A file that is damaged, foreign, or made for another version."""

    exit_code = 4
