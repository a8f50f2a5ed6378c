"""What /metrics shows, in Prometheus' words; the C++ example service has the same names."""

from __future__ import annotations

from functools import partial

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..runtime.samples import Report

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 128, 256)
_ERRORS = tuple(10.0**power for power in range(-7, 3))


class Metrics:
    """Counters of one service; a registry of their own, so that two services in a process do not meet."""

    def __init__(self, engine: str = "") -> None:
        registry = self.registry = CollectorRegistry()
        counter, histogram = partial(Counter, registry=registry), partial(Histogram, registry=registry)
        timer = partial(histogram, buckets=_SECONDS)
        self.samples = counter("tarflow_samples", "Samples drawn.")
        self.nonfinite = counter("tarflow_nonfinite_samples", "Samples drawn that are not finite.")
        self.batches = counter("tarflow_batches", "Batches computed.")
        self.batched = counter("tarflow_batched_requests", "Requests in those batches.")
        self.compute = counter("tarflow_compute_seconds", "Time spent drawing.")
        self.abandoned = counter(
            "tarflow_abandoned_requests", "Requests whose client left or whose time ran out.", ["why"]
        )
        info = Gauge("tarflow_engine_info", "1, of what decodes, and why not others.", ["engine"], registry=registry)
        info.labels(engine).set(1)
        self.queue = Gauge("tarflow_queue_requests", "Requests waiting now.", registry=registry)
        self.batch_samples = histogram("tarflow_batch_samples", "Samples in a batch.", buckets=_ROWS)
        self.block_seconds = timer("tarflow_block_seconds", "Time to invert one flow block for one tile.", ["block"])
        self.passes = counter("tarflow_passes", "Dependent passes (sweeps) by flow block.", ["block"])
        self.certificate = histogram("tarflow_certificate", "Round-trip errors of certified samples.", buckets=_ERRORS)
        self.responses = counter("tarflow_responses", "Answers by route and status.", ["route", "code"])
        self.seconds = timer("tarflow_request_seconds", "Time to answer, by route.", ["route"])

    def drawn(self, report: Report, counts: list[int], seconds: float) -> None:
        """Count one batch, of requests for so many samples each."""
        self.samples.inc(sum(counts))
        self.nonfinite.inc(len(report.nonfinite))
        self.batches.inc()
        self.batched.inc(len(counts))
        self.compute.inc(seconds)
        self.batch_samples.observe(sum(counts))
        for block, passes in enumerate(report.passes):
            self.passes.labels(str(block)).inc(passes)
        if report.certificate is not None:
            for error in report.certificate[np.isfinite(report.certificate)]:  # one that is not would spoil the sum
                self.certificate.observe(float(error))

    def inverted(self, block: int, seconds: float) -> None:
        """Count one block of one tile."""
        self.block_seconds.labels(str(block)).observe(seconds)

    def page(self) -> bytes:
        return generate_latest(self.registry)
