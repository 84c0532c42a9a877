"""Metrics of the server for Prometheus, under Triton's names, so that its dashboards and alerts fit."""

from __future__ import annotations

import re
import time
from asyncio import CancelledError
from functools import partial
from types import TracebackType

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.multiprocess import MultiProcessCollector

from trainer.service.version import ModelDescription

disable_created_metrics()  # a time beside each counter, which only OpenMetrics knows

LABELS = ("model", "version")

# Seconds and numbers of Triton's metrics have no _total behind their names, which prometheus-client appends.
SUFFIX = re.compile(rb"\b(nv_\w+?)_total\b")


class Meters:
    """All metrics of a server.

    Args:
        worker: the number of this process among several, whose metrics are summed. Those of a worker that has died are
            counted on by the one that follows. None: it is alone.
    """

    def __init__(self, worker: int | None = None):
        self.registry = self._shown = CollectorRegistry()
        if worker is None:
            ProcessCollector(registry=self.registry)
        else:  # prometheus-client keeps the numbers of each worker in a file, in PROMETHEUS_MULTIPROC_DIR
            values.ValueClass = values.MultiProcessValue(lambda: worker)
            self._shown = CollectorRegistry()
            MultiProcessCollector(self._shown)
        counter = partial(Counter, labelnames=LABELS, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        self.success = counter("nv_inference_request_success", "Requests that were answered")
        self.failure = Counter(
            "nv_inference_request_failure", "Requests that failed", [*LABELS, "reason"], registry=self.registry
        )
        self.request_us = counter("nv_inference_request_duration_us", "Microseconds of requests, from head to answer")
        self.rows = counter("nv_inference_count", "Examples that were computed")
        self.batches = counter("nv_inference_exec_count", "Batches that were computed")
        self.queue_us = counter("nv_inference_queue_duration_us", "Microseconds that requests have queued")
        self.input_us = counter("nv_inference_compute_input_duration_us", "Microseconds of joining requests to batches")
        self.infer_us = counter("nv_inference_compute_infer_duration_us", "Microseconds of the model, for each request")
        self.output_us = counter("nv_inference_compute_output_duration_us", "Microseconds of splitting batches")
        self.pending = gauge(
            "nv_inference_pending_request_count", "Requests that queue", ["model"], multiprocess_mode="sum"
        )
        gauge = partial(gauge, multiprocess_mode="mostrecent")
        self._version = gauge("silotrain_model_version", "The newest version that is served", ["model"])
        self._accuracy = gauge("silotrain_model_accuracy", "The headline of that version", ["model", "metric"])
        self.refused = Counter(
            "silotrain_model_versions_refused", "Versions that were passed over", ["model"], registry=self.registry
        )

    def of_version(self, model: str, number: int) -> VersionMeters:
        """Return the metrics of a version."""
        return VersionMeters(self, model, str(number))

    def newest(self, model: str, number: int, description: ModelDescription) -> None:
        """Set the gauges of the newest version of a model."""
        self._version.labels(model).set(number)
        if (value := description.metrics.get(description.headline)) is not None:
            self._accuracy.labels(model, description.headline).set(value)

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' format."""
        return SUFFIX.sub(rb"\1", generate_latest(self._shown))


class VersionMeters:
    """The metrics of a version."""

    def __init__(self, meters: Meters, model: str, version: str):
        self._success = meters.success.labels(model, version)
        self._request_us = meters.request_us.labels(model, version)
        self._failure = partial(meters.failure.labels, model, version)
        counters = (meters.rows, meters.batches, meters.queue_us, meters.input_us, meters.infer_us, meters.output_us)
        self._counters = [counter.labels(model, version) for counter in counters]

    def request(self) -> RequestTimer:
        """Return a context manager for the work on a request, which counts its success or failure."""
        return RequestTimer(self)

    def batch(self, rows: int, queue_us: float, input_us: float, infer_us: float, output_us: float) -> None:
        """Count a batch; the microseconds are sums over its requests."""
        for counter, amount in zip(self._counters, (rows, 1, queue_us, input_us, infer_us, output_us), strict=True):
            counter.inc(amount)

    def succeeded(self, microseconds: float) -> None:
        """Count a request that was answered."""
        self._success.inc()
        self._request_us.inc(microseconds)

    def failed(self, reason: str) -> None:
        """Count a request that was not answered."""
        self._failure(reason).inc()


class RequestTimer:
    """The time of a request, from entering to leaving the context."""

    __slots__ = ("_begun", "_meters")

    def __init__(self, meters: VersionMeters):
        self._meters = meters

    def __enter__(self) -> None:
        self._begun = time.perf_counter_ns()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._meters.succeeded((time.perf_counter_ns() - self._begun) / 1000)
        else:
            self._meters.failed("CANCELED" if kind is CancelledError else getattr(error, "reason", "OTHER"))
