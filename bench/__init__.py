"""Measurements against rivals; not part of the package."""
