"""bench/RESULTS.md: sections that benches rewrite, each its own."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from tarflow.runtime.machine import processor

RESULTS = Path(__file__).parent / "RESULTS.md"


def machine() -> str:
    """What the numbers of a section were measured on."""
    import torch  # here: what only writes sections runs before they are installed

    from tarflow.runtime.ort.library import load_onnxruntime

    return (
        f"{os.cpu_count()} cores ({processor()}), {torch.get_num_threads()} threads on both sides, Python "
        f"{platform.python_version()}, torch {torch.__version__}, onnxruntime {load_onnxruntime().__version__}."
    )


def replace_section(path: Path, section: str) -> None:
    """Put ``section`` where its heading stands in the file, or at its end; other sections stay as they are."""
    heading, text = section.splitlines()[0], path.read_text() if path.exists() else "# Results"
    head, *others = ("\n" + text.strip()).split("\n## ")
    sections = [f"## {other}".strip() for other in others]
    places = [i for i, other in enumerate(sections) if other.splitlines()[0] == heading]
    if places:
        sections[places[0]] = section.strip()
    else:
        sections.append(section.strip())
    path.write_text("\n\n".join([head.strip(), *sections]) + "\n")
