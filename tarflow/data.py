"""Training sets by name: ``digits()`` and ``folder(path, ...)``. A door to :mod:`tarflow.train.data`."""

from __future__ import annotations

from .train.data import Dataset, digits, folder

__all__ = ["Dataset", "digits", "folder"]
