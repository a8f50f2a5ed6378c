"""pip's constraints for the lowest versions that pyproject.toml allows: of ``numpy>=1.26``, ``numpy==1.26``."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def lowest_bounds(*extras: str) -> dict[str, str]:
    """Package -> its lower bound, of what is always installed and of ``extras``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    bounds = (re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+).*", line) for line in asked)
    return {found[1]: found[2] for found in bounds if found}


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in lowest_bounds("serve", "ray").items()))
