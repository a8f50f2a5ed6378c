"""``tarflow likelihood`` and ``tarflow denoise``: what the flow says of given images."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from ..runtime.files import check_room, check_writable, replacing
from ..runtime.opening import Opening
from .console import emit, few, identity, say
from .images import Range, Save, as_trained_on, files_asked, read_images, write_images
from .options import BundlePath, Json, Labels, Quiet, opens
from .progress import share_bar

Images = Annotated[
    Path, Argument(help="Images: .npy (N, C, H, W), floats in [-1, 1] or uint8; a picture, or a folder.")
]

_PART = 64  # images encoded between two words about how far it is: as many as the library does at once


@opens
def likelihood(
    bundle: BundlePath,
    images: Images,
    labels: Labels = None,
    save: Annotated[Path | None, Option(help="Write latents z and log_det as .npz.")] = None,
    seed: Annotated[int, Option(help="Seed of the dequantisation noise that 8-bit images get.")] = 0,
    range: Range = None,
    *,
    opening: Opening,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Bits per dimension and log-determinant of images. Floats are taken as they are; 8-bit images get training noise.

    Example: tarflow likelihood tarflow-bundle photos/ --labels 3 --save latent.npz
    """
    import numpy as np

    from ..runtime.flow import Flow
    from ..runtime.image import check_suffix
    from ..runtime.inputs import AS_THEY_ARE, check_images
    from ..runtime.samples import nonfinite

    if save is not None:
        check_suffix(save, (".npz",), "save")
        check_writable(save)
    flow = Flow.open(bundle, opening)
    given = read_images(images, flow.config, range)
    if save is not None:
        check_room(save, 4 * given.pixels.size)
    x = as_trained_on(flow, given.pixels, seed)
    names = given.folder.names if given.folder else None
    _, classes = check_images(flow.config, x, given.classes(labels, flow.bundle.manifest))
    parts = [flow.encode(x[rows], classes[rows], AS_THEY_ARE) for rows in _parts(len(x), "encoding", quiet)]
    z, log_det = (np.concatenate(part) for part in zip(*parts, strict=True))
    bits = flow.bits_of(z, log_det)
    broken = nonfinite(z, log_det, bits)
    if save is not None:
        with replacing(save) as file:
            np.savez(file, z=z, log_det=log_det, logdet=log_det)  # by its earlier name too
    if json:
        scores = {"bits_per_dim": bits.tolist(), "log_det": log_det.tolist(), "nonfinite": broken}
        eight_bits = given.pixels.dtype == np.uint8
        more = {key: value for key, value in (("names", names), ("latent", save)) if value}
        about = {**identity(flow.bundle), "images": len(x), "dequantised": eight_bits}
        emit(**about, mean_bits_per_dim=float(bits.mean()), **scores, **more)
    else:
        for i, (b, d) in enumerate(zip(bits, log_det, strict=True)):
            print(f"{names[i] if names else i:>8}  {b:8.4f} bits/dim  log-determinant {d:8.4f}")
        print(f"mean {bits.mean():.4f} bits/dim over {len(x)} images")
        if labels is None and flow.config.classes and given.folder and given.folder.labels is not None:
            taken = zip(given.folder.labels, classes, strict=True)
            used = [f"'{given.folder.classes[folder]}' {label}" for folder, label in sorted(set(taken))]
            print(f"under the classes of the sub-folders: {few(used)}")
    judge(broken, len(x), "have no finite likelihood")


@opens
def denoise(
    bundle: BundlePath,
    images: Images,
    labels: Labels = None,
    range: Range = None,
    strength: Annotated[float, Option(help="Factor on the noise variance; 1 is the theory's.")] = 1.0,
    save: Save = None,
    output: Annotated[
        Path | None,
        Option("-o", "--output", help="Picture: .png, .jpg or .webp. Default: denoised.png, unless --save."),
    ] = None,
    *,
    opening: Opening,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Remove the model's training noise from images: one step along the gradient of their likelihood.

    Example: tarflow denoise tarflow-bundle noisy.npy --save clean.npy -o clean.png
    """
    import numpy as np

    from ..runtime.flow import Flow
    from ..runtime.inputs import AS_THEY_ARE, check_images
    from ..runtime.samples import nonfinite

    files = files_asked(save, output, "denoised.png")
    flow = Flow.open(bundle, opening)
    given = read_images(images, flow.config, range)
    stored = given.pixels
    if save is not None:
        check_room(save, 4 * stored.size)
    x = np.asarray(stored.astype(np.float32) / 127.5 - 1) if stored.dtype == np.uint8 else stored
    _, classes = check_images(flow.config, x, given.classes(labels, flow.bundle.manifest))
    parts = _parts(len(x), "denoising", quiet)
    result = np.concatenate([flow.denoise(x[rows], classes[rows], strength, AS_THEY_ARE) for rows in parts])
    write_images(result, files, flow.bundle, {})
    change, broken = float(np.sqrt(np.mean((result - x) ** 2))), nonfinite(result)
    if json:
        emit(**identity(flow.bundle), images=len(x), files=files, rms_change=change, nonfinite=broken)
    else:
        print(f"{len(x)} images denoised, changed by {change:.3g} rms: {', '.join(map(str, files.values()))}")
    judge(broken, len(x), "are not finite once denoised")


def _parts(count: int, what: str, quiet: bool) -> Iterator[slice]:
    """The images part by part, telling how far it is."""
    with share_bar(what, quiet) as tell:
        for start in builtins.range(0, count, _PART):
            tell(start / count)
            yield slice(start, start + _PART)


def judge(broken: Sequence[int], count: int, what: str) -> None:
    """End with 1 if any of some images came to nothing."""
    if broken:
        say(
            f"tarflow: check failed: {len(broken)} of {count} images {what}: {few(broken)}. They are nothing like the "
            "images of this model"
        )
        raise Exit(1)
