"""The Prometheus endpoint, at every kind of address."""

import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter

from server.metrics_endpoint import metrics_endpoint


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "", "localhost"])
def test_it_answers_at_the_address_that_it_tells(host: str) -> None:
    registry = CollectorRegistry()
    Counter("answers", "Answers", registry=registry).inc()
    with metrics_endpoint(f"{host}:0", registry) as address:
        told, _, port = address.rpartition(":")
        assert (told, port != "0") == (host, True)
        with urllib.request.urlopen(f"http://{host or '127.0.0.1'}:{port}/metrics") as response:
            assert "answers_total 1.0" in response.read().decode()


def test_there_may_be_none() -> None:
    with metrics_endpoint("", CollectorRegistry()) as address:
        assert address == ""
