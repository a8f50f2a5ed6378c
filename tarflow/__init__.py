"""TarFlow normalizing flows, from PyTorch checkpoints to production (arXiv 2412.06329).

    from tarflow import Flow, Guidance

    with Flow.open("my-bundle") as flow:
        images = flow.sample(64, guidance=1.0, seed=7, certify=True)
    images.save("grid.png")

Importing this imports no engine, and not even numpy: what it names is loaded when it is asked for.
"""

TYPE_CHECKING = False  # as type checkers know it; typing's own would take longer to import than all else here
if TYPE_CHECKING:
    from .runtime.flow import Flow as Flow
    from .runtime.flow import Guidance as Guidance

    __version__: str

__all__ = ["Flow", "Guidance", "__version__"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("tarflow")
    if name in __all__:
        from .runtime import flow

        return getattr(flow, name)
    raise AttributeError(f"module 'tarflow' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
