"""``tarflow check-engine``: will TensorRT take these graphs?"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Annotated

from typer import Option

from ..runtime.errors import CheckFailed, Remedy
from .console import emit
from .options import BundleArgument, Json, Quiet
from .progress import stages


def check_engine(
    bundle: BundleArgument,
    nodes: Annotated[bool, Option("--nodes", help="List every node, not only the refused ones.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Ask TensorRT's parser about every node of every graph, and build every graph, keeping nothing. Needs no GPU.

    The step graphs, which only a host runs, are asked about too: no engine is ever made of them.

    Exit code 1 if a node is refused or a graph does not build.

    Example: tarflow check-engine imagenet64
    """
    from ..export.engines.check import check

    with stages(quiet=json or quiet) as watch:
        tensorrt, verdicts = check(bundle, watch=watch)
    failed = [verdict for verdict in verdicts if not verdict.built]
    if json:
        emit(tensorrt=tensorrt, ok=not failed, graphs=[asdict(verdict) for verdict in verdicts])
    else:
        print(f"{tensorrt}, {bundle.manifest.precision} graphs of {bundle.folder}")
        for verdict in verdicts:
            taken = len(verdict.nodes) - len(verdict.refused)
            state = f"built in {verdict.seconds:.1f} s" if verdict.built else f"NOT BUILT: {verdict.reason}"
            print(f"  {verdict.graph}: {taken} of {len(verdict.nodes)} nodes taken, {state}")
            for node in verdict.nodes if nodes else verdict.refused:
                print(f"    {node.name} ({node.operator}): {'taken' if node.supported else 'REFUSED'}")
    if failed:
        operators = Counter(node.operator for verdict in failed for node in verdict.refused)
        refused = ", ".join(f"{name} ({count})" for name, count in operators.most_common())
        raise CheckFailed(
            f"{len(failed)} of {len(verdicts)} graphs do not become engines"
            + (f"; refused operators: {refused}" if refused else "")
            + ". Graphs of this tarflow do: export the bundle again",
            remedy=Remedy("export"),
        )
