"""A bundle, opened on an engine. The one place that knows every provider; each is imported when it is asked for."""

from __future__ import annotations

from dataclasses import replace

from .backend import Backend
from .bundle import Bundle
from .errors import BundleError, MachineError, Remedy, briefly
from .opening import Opening


def open_backend(bundle: Bundle, opening: Opening) -> Backend:
    """Open a bundle as ``opening`` says. For provider "auto" the backend's ``description`` says why not the others.

    Raises MachineError when the machine cannot run it, BundleError when the bundle has no engines that fit, InputError
    for a limit of memory that one image exceeds.
    """
    if opening.provider != "auto":
        return _open(bundle, opening)
    reasons = []
    for name in ("tensorrt", "cuda"):
        try:
            backend = _open(bundle, replace(opening, provider=name))
        except (MachineError, BundleError) as error:
            reasons.append(f"not {name}: {briefly(error)}")
        else:
            break
    else:
        backend = _open(bundle, replace(opening, provider="cpu"))
    backend.description = "; ".join([backend.description, *reasons])
    return backend


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
