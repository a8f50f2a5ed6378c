"""Which way each block is decoded: as was asked for, as was measured here, or serially."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .chain import Ways
from .decode import Parallel, tolerance_of
from .request import Request

if TYPE_CHECKING:
    from .flow import Flow


def ways_of(flow: Flow, request: Request, images: int) -> Ways:
    """How each block is decoded for so many images. A reproducible run does not follow what was measured here."""
    plan, branches = None if request.reproducible else flow.plan, 2 if request.guidance.scale else 1
    serially: tuple[Parallel | None, ...] = (None,) * flow.config.blocks
    by_tolerance = "exact" if not request.tolerance else "fast"
    mode = request.decode or ("serial" if plan is None and request.tolerance is None else by_tolerance)
    limit = tolerance_of(mode, request.tolerance)
    if plan is not None and images > 1 and plan.lanes(mode, images, branches) > 1 and flow.lanes is not None:
        return Ways(f"serially in {flow.lanes.count} lanes, as calibrated", serially, flow.lanes)
    if mode == "serial":
        return Ways("serial", serially)
    if not settles(flow):
        return Ways(f"serially, not {mode}: in int8 on ONNX Runtime, parallel decoding does not settle", serially)
    words = f"parallel to {limit:g}"
    if plan is None:
        how = Parallel(flow.backend.window, limit, flow.config.tokens - 1, steady=request.reproducible)
        return Ways(words, (how,) * flow.config.blocks)
    blocks = plan.ways(mode, images, branches, limit) or serially
    return Ways(f"{words if any(blocks) else 'serially'}, as calibrated", blocks)


def settles(flow: Flow) -> bool:
    """Whether decoding in parallel comes to an end. ONNX Runtime's int8 products round a row of a window otherwise than
    the row alone: no patch is ever found a second time.
    """
    return flow.backend.precision != "int8" or flow.backend.portable
