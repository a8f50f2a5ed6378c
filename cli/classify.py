"""``tarflow classify``: of which class given images are, by their exact likelihood under each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ..runtime.errors import InputError
from ..runtime.opening import Opening
from .console import emit, identity, label_choices, say
from .images import Range, read_images
from .likelihood import Images, judge
from .options import BundlePath, Json, Labels, Quiet, opens
from .progress import step_bar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..runtime.bundle import Manifest
    from ..runtime.classify import Classification


@opens
def classify(
    bundle: BundlePath,
    images: Images,
    top: Annotated[int, Option(help="Classes told of each image, the most probable first.")] = 3,
    classes: Annotated[str | None, Option(help="Classes to compare: 0-9, or 1,4,7. Default: all.")] = None,
    labels: Labels = None,
    seed: Annotated[int, Option(help="Seed of the dequantisation noise that 8-bit images get.")] = 0,
    range: Range = None,
    *,
    opening: Opening,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """The most probable classes of images: exact likelihoods under every class, each equally probable beforehand.

    Of folders of classes, or with --labels, the accuracy too.

    Example: tarflow classify tarflow-bundle photos/ --top 3
    """
    import numpy as np

    from ..runtime.flow import Flow
    from ..runtime.inputs import AS_THEY_ARE, check_labels
    from ..runtime.samples import nonfinite

    if top < 1:
        raise InputError.of("top", top, "1 class or more")
    compared = None if classes is None else label_choices(classes, "classes")
    flow = Flow.open(bundle, opening)
    manifest = flow.bundle.manifest
    given = read_images(images, flow.config, range)
    truth = given.classes(labels, manifest)
    if truth is not None:
        truth = check_labels(flow.config, truth, len(given.pixels))
    with step_bar("classifying", quiet=quiet) as steps:
        found = flow.classify(given.pixels, compared, seed=seed, range=AS_THEY_ARE, progress=steps.step)
    shown, broken = found.ranked()[:, :top], nonfinite(found.probabilities.astype(np.float32))
    names = given.folder.names if given.folder else [str(i) for i, _ in enumerate(shown)]
    accuracy = None if truth is None else _accuracy(shown[:, 0], truth)
    if json:
        more: dict[str, Any] = {"names": names if given.folder else None, "class_names": manifest.class_names or None}
        more |= {"labels": truth, "accuracy": accuracy} if accuracy is not None else {}
        arrays = {"classes": found.classes, "top": shown, "probabilities": found.probabilities}
        arrays |= {"log_likelihoods": found.log_likelihoods}
        about = {**identity(flow.bundle), "images": len(shown), "nonfinite": broken}
        emit(**about, **{key: value for key, value in more.items() if value is not None}, **arrays)
    else:
        _tell(found, shown, names, manifest)
        if truth is not None and accuracy is not None:
            print(f"accuracy {100 * accuracy:.1f} % of {int((truth >= 0).sum())} images whose class is known")
    if truth is not None and (missing := sorted({*truth[truth >= 0].tolist()} - {*found.classes.tolist()})):
        say(f"tarflow: warning: images of classes that were not compared count as wrong: {missing}")
    judge(broken, len(shown), "have no finite likelihood")


def _tell(found: Classification, shown: NDArray[np.int64], names: list[str], manifest: Manifest) -> None:
    column = {label: k for k, label in enumerate(found.classes.tolist())}
    width = max(map(len, names))
    for i, (name, labels) in enumerate(zip(names, shown.tolist(), strict=True)):
        shares = [f"{manifest.class_name(k)} {100 * found.probabilities[i, column[k]]:.1f} %" for k in labels]
        print(f"{name:>{width}}  {'  '.join(shares)}")


def _accuracy(first: NDArray[np.int64], truth: NDArray[np.int64]) -> float | None:
    """The share of images whose most probable class is theirs, of those whose class is known."""
    known = truth >= 0
    return float((first == truth)[known].mean()) if known.any() else None
