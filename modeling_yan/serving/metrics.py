"""Figures of a server in Prometheus' text form."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
VANISHED = 499  # the status of a client that left before its answer was generated


class Metrics:
    """Counts of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("yan_requests", "Requests that were answered", ["endpoint", "status"], **own)
        self.seconds = Histogram("yan_request_seconds", "From request to answer", ["endpoint"], buckets=SECONDS, **own)
        self.tokens = Counter("yan_tokens", "Tokens that were read and generated", ["kind"], **own)
        self.batches = Histogram("yan_batch_size", "Prompts that one was generated with", buckets=SIZES, **own)
        self.open = Gauge("yan_open_requests", "Requests that wait or are being answered", **own)

    def count(self, endpoint: str, status: int, started: float, usage: dict[str, Any] | None = None) -> None:
        """A request that is over; `started` is its `time.monotonic()`."""
        self.requests.labels(endpoint, status).inc()
        self.seconds.labels(endpoint).observe(time.monotonic() - started)
        if usage is not None:
            for kind in ("prompt", "completion"):
                self.tokens.labels(kind).inc(usage[f"{kind}_tokens"])

    def text(self, num_open: int) -> bytes:
        self.open.set(num_open)
        return generate_latest(self.registry)
