"""/metrics: the server's own counters, and the engine's, in Prometheus' text form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..base import Answer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds; a nano model on a laptop answers in 10 ms, a 3B model on a phone in a minute.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_PREFIX = "tinyllava_edge"
_LEVELS = ("bytes", "entries", "disk_bytes")  # of a cache's figures, those that may fall


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self, stats: Callable[[], Mapping[str, Any]], body_bytes: Callable[[], float]) -> None:
        """`stats` gives Engine.stats(), or nothing while the engine loads; `body_bytes` the memory held for bodies."""
        self.registry = CollectorRegistry()
        held = Gauge(f"{_PREFIX}_body_bytes", "Memory held for the bodies of requests.", registry=self.registry)
        held.set_function(body_bytes)
        self._requests = Counter(
            f"{_PREFIX}_http_requests", "Replies by route and status.", ["route", "status"], registry=self.registry
        )
        self._answers = Counter(
            f"{_PREFIX}_answers",
            "Chat requests that reached the engine, by outcome: stop, length, gone, timeout, shutdown, error.",
            ["outcome"],
            registry=self.registry,
        )
        self._first = Histogram(
            f"{_PREFIX}_time_to_first_token_seconds",
            "From the engine's start on a request to its first token, waiting in the queue not included.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._whole = Histogram(
            f"{_PREFIX}_answer_seconds",
            "From the whole request to the whole answer, waiting included.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.registry.register(_EngineStats(stats))

    def replied(self, route: str, status: int) -> None:
        """Count a reply; status 0 is a client that went before one."""
        self._requests.labels(route, str(status)).inc()

    def answered(self, answer: Answer, seconds: float) -> None:
        """Count a whole answer."""
        self._answers.labels(answer.finish_reason).inc()
        self._first.observe(answer.timings.ttft_ms / 1000)
        self._whole.observe(seconds)

    def ended(self, outcome: str) -> None:
        """Count a chat request without a whole answer."""
        self._answers.labels(outcome).inc()

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)


class _EngineStats(Collector):
    """The engine's counts, read when asked for."""

    def __init__(self, stats: Callable[[], Mapping[str, Any]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if not stats:
            return
        yield _counters("engine_requests", "Requests of the engine by outcome.", "outcome", stats["requests"])
        yield _counters("tokens", "Tokens by kind; a picture counts with all its embeddings.", "kind", stats["tokens"])
        for name, text in (("waiting", "Requests that wait."), ("running", "Requests that run: 0 or 1.")):
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=float(stats[name]))
        for cache, values in stats["caches"].items():
            for name, value in values.items():
                text = f"The {cache} cache: {name.replace('_', ' ')}."
                family = GaugeMetricFamily if name in _LEVELS else CounterMetricFamily
                yield family(f"{_PREFIX}_cache_{cache}_{name}", text, value=float(value))

    def describe(self) -> Iterator[Metric]:
        """Nothing: the names follow from the engine's counts, which aren't there while it loads."""
        return iter(())


def _counters(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"{_PREFIX}_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
