"""``tarflow serve``: samples and likelihoods over HTTP."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TextIO

from typer import Option

from ..runtime.bundle import Bundle
from ..runtime.errors import InputError
from ..runtime.opening import ON_DEVICE, Opening
from .console import emit_line, identity
from .options import DECODING, BundleArgument, Drawing, Json, Ray, draws, opens

TOKEN = "TARFLOW_TOKEN"
_MULTIPROCESS = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")  # of servers of many processes; this is one


@opens
@draws(*DECODING)
def serve(
    bundle: BundleArgument,
    host: Annotated[str, Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 takes a free one and says which.")] = 8080,
    queue: Annotated[int, Option(help="Requests that may wait; one more is answered 429.")] = 64,
    batch: Annotated[int, Option(help="Samples drawn together at most.")] = 64,
    delay_ms: Annotated[float, Option(help="How long a request waits for others to fill its tile.")] = 5.0,
    timeout: Annotated[float, Option(help="Seconds a request may take, waiting included; then 504.")] = 60.0,
    max_n: Annotated[int, Option(help="Samples or images in one request.")] = 256,
    max_body: Annotated[int, Option(help="MiB of a request's body.")] = 64,
    workers: Annotated[int | None, Option(help="Batches at a time. Default: 2 on 2 or more CPU cores, else 1.")] = None,
    token_file: Annotated[Path | None, Option(help=f"File with the bearer token of requests. Or set {TOKEN}.")] = None,
    certify: Annotated[bool, Option("--certify", help="Encode every sample again, for the metrics.")] = False,
    grace: Annotated[float, Option(min=0, help="Seconds from readiness going off to the last connection taken.")] = 1.0,
    allowed_hosts: Annotated[
        list[str] | None, Option(help="A name this server goes by, as in Host; again for more, * for any.")
    ] = None,
    ray: Ray = None,
    replicas: Annotated[
        str | None, Option(help="With --ray: how many, or the least and the most that load decides between (1,4).")
    ] = None,
    *,
    drawing: Drawing,
    opening: Opening,
    json: Json = False,
) -> None:
    """Serve a bundle over HTTP: the Open Inference Protocol, /v1/samples, a page, metrics. docs/SERVE.md has it all.

    Example: tarflow serve --port 8080

    Replicas on a Ray cluster: tarflow serve my-bundle --ray auto --replicas 1,4 --host 0.0.0.0
    """
    from ..serve.log import keep_stderr_from_deciding

    keep_stderr_from_deciding()
    for name in _MULTIPROCESS:
        os.environ.pop(name, None)
    from ..runtime.flow import Flow
    from ..runtime.machine import cores, cores_each
    from ..runtime.providers import settled
    from ..serve.app import create_app
    from ..serve.server import listen, names_of
    from ..serve.server import serve as run
    from ..serve.settings import Settings

    if ray is None and replicas is not None:
        raise InputError(
            "`replicas` means nothing without `ray`; for batches computed at a time in one process: `workers`"
        )
    on_cpu = settled(bundle, opening).provider_name not in ON_DEVICE
    if workers is None:
        workers = 2 if on_cpu and cores() > 1 else 1
    if opening.threads is None and on_cpu and ray is None:
        opening = replace(opening, threads=cores_each(workers))
    bounds = queue, batch, delay_ms / 1000, workers, timeout, max_n, max_body << 20
    settings = Settings(*bounds, _token(token_file), certify=certify, **drawing.said)
    listener = listen(host, port, stall=timeout)
    settings = replace(settings, allowed_hosts=names_of(listener, tuple(allowed_hosts or ())))
    if ray is not None:
        from ..serve.replicas import Deployment, parse_replicas, serve_on_ray

        number = parse_replicas(replicas or "1")
        deployment = Deployment(bundle.folder.absolute(), bundle.hash, opening, settings, number)
        where = host, listener.getsockname()[1]
        listener.close()  # it was free; the proxies bind it themselves
        stdout = sys.stdout  # Ray's own words go elsewhere
        serve_on_ray(ray, deployment, where, lambda text: _announce(where, bundle, text, json, stdout))
        return
    flow = Flow.open(bundle, opening)
    address = listener.getsockname()[:2]
    engine = flow.backend.description
    run(create_app(flow, settings), listener, grace, lambda: _announce(address, bundle, engine, json, sys.stdout))


def _announce(where: tuple[str, int], bundle: Bundle, engine: str, json: bool, stdout: TextIO) -> None:
    """Say that the server is ready: a line, or one document, for whoever waits for it to read at once."""
    with contextlib.redirect_stdout(stdout):
        if json:
            emit_line(url=_url(*where), host=where[0], port=where[1], **identity(bundle), backend=engine)
        else:
            print(f"listening on {_url(*where)} with {engine}", flush=True)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _token(file: Path | None) -> str | None:
    """The token that is asked for, from a file or the environment; never an argument, which others can see."""
    if file is None:
        return os.environ.get(TOKEN, "").strip() or None
    try:
        return file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"`token_file` '{file}' cannot be read ({why}); expected a file with one line") from None
