"""A bundle, opened on an engine. The one place that knows every provider; each is imported when it is asked for."""

from __future__ import annotations

from dataclasses import replace

from .backend import Backend
from .bundle import Bundle
from .errors import BundleError, MachineError, Remedy, briefly
from .gpus import gpus
from .native.choice import why_not
from .opening import NATIVE_PRECISIONS, Opening


def open_backend(bundle: Bundle, opening: Opening) -> Backend:
    """Open a bundle as ``opening`` says. For provider "auto" the backend's ``description`` says why not the others.

    Raises MachineError when the machine cannot run it, BundleError when the bundle has no engines that fit, InputError
    for a limit of memory that one image exceeds.
    """
    _, backend, reasons = _first(bundle, opening)
    backend.description = "; ".join([backend.description, *reasons])
    return backend


def settled(bundle: Bundle, opening: Opening, native: bool = True) -> Opening:
    """The opening with the provider that "auto" stands for on this machine, the ``native`` engine left out or not.

    Raises what :func:`open_backend` raises.
    """
    if opening.provider == "auto" and gpus():
        bundle.check_runnable()  # before a graph is loaded there
    provider, _, _ = _first(bundle, opening, native)
    return replace(opening, provider=provider)


def _first(bundle: Bundle, opening: Opening, native: bool = True) -> tuple[str, Backend, list[str]]:
    """Which provider it is, open, and why "auto" took none that comes before it."""
    asked = opening.else_on("auto")
    if asked.provider != "auto":
        return asked.provider, _open(bundle, asked), []
    errors: dict[str, MachineError | BundleError] = {}
    for name in ("tensorrt", "cuda"):
        try:
            return name, _open(bundle, replace(opening, provider=name)), _reasons(errors)
        except (MachineError, BundleError) as error:
            errors[name] = error
    why = why_not(bundle, opening) if native else None
    if native and why is None:
        return "native", _open(bundle, replace(opening, provider="native")), _reasons(errors)
    reasons = [] if why is None else [f"not native: {why}"]
    return "cpu", _open(bundle, replace(opening, provider="cpu")), reasons + _reasons(errors)


def _reasons(errors: dict[str, MachineError | BundleError]) -> list[str]:
    """Why not these providers, each in a few words: where there is no GPU, that is why."""
    plain = all(isinstance(error, MachineError) for error in errors.values()) and not gpus()
    return [f"not {name}: {'no NVIDIA GPU' if plain else briefly(error)}" for name, error in errors.items()]


def native_backends(bundle: Bundle) -> dict[str, Backend]:
    """The native engine in each of its precisions, one block of weights at a time; none where it cannot run."""
    from .native.backend import NativeBackend

    if bundle.manifest.precision == "bf16":
        return {}
    openings = {name: Opening("native", memory="least", precision=name) for name in NATIVE_PRECISIONS}
    try:
        return {name: NativeBackend(bundle, opening) for name, opening in openings.items()}
    except MachineError:  # it was not built
        return {}


def _open(bundle: Bundle, opening: Opening) -> Backend:
    if opening.provider_name == "tensorrt":
        from .tensorrt.backend import open_tensorrt

        return open_tensorrt(bundle, opening)
    from .ort.backend import OrtBackend

    if bundle.manifest.precision == "bf16" and opening.provider in ("native", "cpu"):
        raise MachineError(
            "this bundle is bf16, and ONNX Runtime has no bf16 matrix product on CPUs; open it with `provider` cuda, "
            "or export it for this machine, in fp32",
            field="provider",
            found=opening.provider,
            expected="cuda",
            remedy=Remedy("export", {"engine": "fp32"}),
        )
    if opening.provider == "native":
        from .native.backend import NativeBackend

        return NativeBackend(bundle, opening)
    return OrtBackend(bundle, opening)
