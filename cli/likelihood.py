"""``tarflow likelihood`` and ``tarflow denoise``: what the flow says of given images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..runtime.files import check_room, check_writable, replacing
from ..runtime.opening import Opening
from .console import emit, identity, parse_labels
from .images import Save, as_trained_on, files_asked, read_images, write_images
from .options import BundlePath, Json, Labels, opens

Images = Annotated[Path, Argument(help="Images: .npy (N, C, H, W), floats in [-1, 1] or uint8; or a folder.")]


@opens
def likelihood(
    bundle: BundlePath,
    images: Images,
    labels: Labels = None,
    save: Annotated[Path | None, Option(help="Write latents z and logdet as .npz.")] = None,
    seed: Annotated[int, Option(help="Seed of the dequantisation noise that 8-bit images get.")] = 0,
    *,
    opening: Opening,
    json: Json = False,
) -> None:
    """Bits per dimension and log-determinant of images. Floats are taken as they are; 8-bit images get training noise.

    Example: tarflow likelihood tarflow-bundle photos/ --labels 3 --save latent.npz
    """
    import numpy as np

    from ..runtime.flow import Flow

    if save is not None:
        check_writable(save)
    flow = Flow.open(bundle, opening)
    stored, names = read_images(images, flow.config)
    if save is not None:
        check_room(save, 4 * stored.size)
    x = as_trained_on(flow, stored, seed)
    z, log_det = flow.encode(x, parse_labels(labels, 0, len(x)))
    bits = flow.bits_of(z, log_det)
    if save is not None:
        with replacing(save) as file:
            np.savez(file, z=z, logdet=log_det)
    if json:
        scores = {"bits_per_dim": bits.tolist(), "log_det": log_det.tolist(), "dequantised": stored.dtype == np.uint8}
        more = {key: value for key, value in (("names", names), ("latent", save)) if value}
        emit(**identity(flow.bundle), images=len(x), mean_bits_per_dim=float(bits.mean()), **scores, **more)
        return
    for i, (b, d) in enumerate(zip(bits, log_det, strict=True)):
        print(f"{names[i] if names else i:>8}  {b:8.4f} bits/dim  log-determinant {d:8.4f}")
    print(f"mean {bits.mean():.4f} bits/dim over {len(x)} images")


@opens
def denoise(
    bundle: BundlePath,
    images: Images,
    labels: Labels = None,
    strength: Annotated[float, Option(help="Factor on the noise variance; 1 is the theory's.")] = 1.0,
    save: Save = None,
    output: Annotated[
        Path | None, Option("-o", "--output", help="Picture. Default: denoised.png, unless --save.")
    ] = None,
    *,
    opening: Opening,
    json: Json = False,
) -> None:
    """Remove the model's training noise from images: one step along the gradient of their likelihood.

    Example: tarflow denoise tarflow-bundle noisy.npy --save clean.npy -o clean.png
    """
    import numpy as np

    from ..runtime.flow import Flow

    files = files_asked(save, output, "denoised.png")
    flow = Flow.open(bundle, opening)
    stored, _ = read_images(images, flow.config)
    if save is not None:
        check_room(save, 4 * stored.size)
    x = np.asarray(stored.astype(np.float32) / 127.5 - 1) if stored.dtype == np.uint8 else stored
    result = flow.denoise(x, parse_labels(labels, 0, len(x)), strength)
    write_images(result, files, flow.bundle, {})
    change = float(np.sqrt(np.mean((result - x) ** 2)))
    if json:
        emit(**identity(flow.bundle), images=len(x), files=files, rms_change=change)
    else:
        print(f"{len(x)} images denoised, changed by {change:.3g} rms: {', '.join(map(str, files.values()))}")
