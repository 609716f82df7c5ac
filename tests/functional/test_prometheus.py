# SPDX-License-Identifier: Apache-2.0
"""A cache's events, scraped over HTTP from Prometheus' own client."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from imagebackend import exceptions
from imagebackend.templates.prometheus import PrometheusObserver
from tests.contract.conftest import Store


def scraped(registry: CollectorRegistry) -> dict[str, float]:
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith(("_created", "_bucket")):
                found["/".join([sample.name.removeprefix("imagebackend_template_"), *sample.labels.values()])] = (
                    sample.value
                )
    return found


def test_what_happens_is_counted(tmp_path: Path) -> None:
    store = Store(tmp_path, "qcow2", {})
    registry = CollectorRegistry()
    templates = store.backend.templates
    templates.observers.append(PrometheusObserver(registry))

    store.make()
    store.make(disk_name="disk.two").remove()
    with pytest.raises(FileNotFoundError):
        templates.fetch("other", lambda target: Path("/nowhere/image").read_bytes())
    templates.fetch("unused", store.fetch)
    size = templates.catalogue.entry("unused").own
    templates.prune(templates.policy(minimum_age=0))
    with open(templates.get("template").path, "r+b") as file:
        file.write(b"x")
    with pytest.raises(exceptions.CorruptTemplate):
        templates.verify("template")

    found = scraped(registry)
    assert found.pop("fetch_seconds_sum") > 0
    length = store.raw_template.stat().st_size
    assert found == {
        "requests_total/hit": 1,
        "requests_total/miss": 3,
        "fetches_total/finished": 2,
        "fetches_total/failed": 1,
        "fetched_bytes_total": 2 * length,
        "fetch_seconds_count": 2,
        "evictions_total/": 1,
        "reclaimed_bytes_total/": size,
        "quarantines_total": 1,
        "leases_total/made": 2,
        "leases_total/dropped": 1,
    }
