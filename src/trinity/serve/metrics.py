"""What the server counts, in Prometheus' text format."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trinity.serve.worker import Gauges

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters and histograms of one server; a registry of its own, so that tests may run several."""

    def __init__(self, model: str, gauges: Callable[[], Gauges]) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.requests = Counter(
            "trinity_requests", "Requests by path and status.", ("path", "status"), registry=registry
        )
        self.disconnects = Counter("trinity_disconnects", "Clients that left before the end.", registry=registry)
        self.prompt_tokens = Counter("trinity_prompt_tokens", "Tokens of accepted prompts.", registry=registry)
        self.new_tokens = Counter("trinity_generation_tokens", "Tokens generated.", registry=registry)
        self.first_token = Histogram(
            "trinity_time_to_first_token_seconds",
            "From admission to the first token.",
            buckets=_FIRST,
            registry=registry,
        )
        self.next_token = Histogram(
            "trinity_time_per_output_token_seconds", "Between two tokens.", buckets=_NEXT, registry=registry
        )
        self.duration = Histogram(
            "trinity_request_seconds", "Whole requests for answers.", buckets=_WHOLE, registry=registry
        )
        Gauge("trinity_model", "1 for the model that is served.", ("name",), registry=registry).labels(model).set(1)
        registry.register(_EngineGauges(gauges))

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self._registry)


class _EngineGauges(Collector):
    """Read when asked, so that nothing has to be kept up to date."""

    def __init__(self, gauges: Callable[[], Gauges]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        now = self._gauges()
        yield GaugeMetricFamily("trinity_answers_running", "Answers being generated.", now.running)
        yield GaugeMetricFamily("trinity_answers_waiting", "Answers that wait for room.", now.waiting)
        yield GaugeMetricFamily("trinity_cache_bytes", "Key and value cache in use.", now.cache_bytes)
        yield CounterMetricFamily("trinity_engine_failures", "Steps of the engine that failed.", now.failures)
        yield GaugeMetricFamily("process_resident_memory_bytes", "Resident memory.", resident_bytes())


def resident_bytes() -> int:
    """Resident memory of this process; 0 where /proc does not tell."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0
