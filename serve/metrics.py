"""What /metrics shows, in Prometheus' words; the C++ example service has the same names."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..runtime.samples import Report

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 128, 256)
_ERRORS = tuple(10.0**power for power in range(-7, 3))


class Metrics:
    """Counters of one service; a registry of their own, so that two services in a process do not meet."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.samples = Counter("tarflow_samples", "Samples drawn.", registry=registry)
        self.nonfinite = Counter("tarflow_nonfinite_samples", "Samples drawn that are not finite.", registry=registry)
        self.batches = Counter("tarflow_batches", "Batches computed.", registry=registry)
        self.batched = Counter("tarflow_batched_requests", "Requests in those batches.", registry=registry)
        self.compute = Counter("tarflow_compute_seconds", "Time spent drawing.", registry=registry)
        self.abandoned = Counter(
            "tarflow_abandoned_requests",
            "Requests whose client left or whose time ran out.",
            ["why"],
            registry=registry,
        )
        self.queue = Gauge("tarflow_queue_requests", "Requests waiting now.", registry=registry)
        self.batch_samples = Histogram("tarflow_batch_samples", "Samples in a batch.", buckets=_ROWS, registry=registry)
        self.block_seconds = Histogram(
            "tarflow_block_seconds",
            "Time to invert one flow block for one tile.",
            ["block"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.passes = Counter(
            "tarflow_passes", "Dependent passes (sweeps) by flow block.", ["block"], registry=registry
        )
        self.certificate = Histogram(
            "tarflow_certificate", "Round-trip errors of certified samples.", buckets=_ERRORS, registry=registry
        )
        self.responses = Counter(
            "tarflow_responses", "Answers by route and status.", ["route", "code"], registry=registry
        )
        self.seconds = Histogram(
            "tarflow_request_seconds", "Time to answer, by route.", ["route"], buckets=_SECONDS, registry=registry
        )

    def watch_queue(self, length: Callable[[], int]) -> None:
        self.queue.set_function(length)

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
