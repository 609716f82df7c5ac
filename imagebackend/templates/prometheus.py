# SPDX-License-Identifier: Apache-2.0
"""What happens in the cache, counted for Prometheus; needs the extra ``prometheus``.

::

    backend.templates.observers.append(PrometheusObserver())
"""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from imagebackend.templates.events import Event

__all__ = ["PrometheusObserver"]

_PREFIX = "imagebackend_template"
# From an image in the host's own network to one from far away; seconds.
_BUCKETS = (1, 3, 10, 30, 100, 300, 1000, 3000)


class PrometheusObserver:
    """Counts events. Names of templates are no labels: users choose them, and each would be a series for ever.

    :param registry: where the metrics are registered; a process has one observer for each.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{_PREFIX}_{name}", text, labels, registry=registry)

        self._requests = counter("requests", "Templates that were asked for, by whether they were there", "result")
        self._fetches = counter("fetches", "Fetches that ended, by how", "result")
        self._fetched = counter("fetched_bytes", "Bytes of the templates that were fetched")
        self._seconds = Histogram(
            f"{_PREFIX}_fetch_seconds",
            "How long fetches took that succeeded",
            buckets=_BUCKETS,
            registry=registry,
        )
        self._evicted = counter("evictions", "Templates that were pruned, by store; empty: the cache", "store")
        self._reclaimed = counter("reclaimed_bytes", "Bytes that pruning gave back, by store", "store")
        self._quarantined = counter("quarantines", "Templates that were found damaged")
        self._leases = counter("leases", "Leases of disks on templates, made and dropped", "change")

    def __call__(self, event: Event) -> None:
        """Count an event."""
        match event.kind:
            case "hit" | "miss":
                self._requests.labels(event.kind).inc()
            case "fetch.finished":
                self._fetches.labels("finished").inc()
                self._fetched.inc(event.facts["size"])
                self._seconds.observe(event.facts["seconds"])
            case "fetch.failed":
                self._fetches.labels("failed").inc()
            case "evicted":
                self._evicted.labels(event.facts["store"]).inc()
                self._reclaimed.labels(event.facts["store"]).inc(event.facts["size"])
            case "quarantined":
                self._quarantined.inc()
            case "lease.made" | "lease.dropped":
                self._leases.labels(event.kind.partition(".")[2]).inc()
