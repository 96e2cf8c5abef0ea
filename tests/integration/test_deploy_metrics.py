"""What the alerts and the board ask of services moves when something happens. Engines: tests/engine/test_metrics.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from deployed import metrics_of, queries
from engines import Asked, completion
from gateways import Gateway
from prometheus_client.parser import text_string_to_metric_families

from agentstate.api import metrics
from agentstate.client import message

# It ends with an engine that breaks off, and with waits that were announced: tests of these count them.
ELSEWHERE = {"agentstate_gateway_broken_streams_total", "agentstate_forecast_waits_total", "agentstate_notices_total"}


def values(gateway: Gateway) -> dict[str, float]:
    """The sum of each series."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(gateway.service.http.get("/metrics").text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_what_is_asked_for_moves(make_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "COUNT_S", -1.0)

    def answer(asked: Asked) -> None:
        asked.whole(completion("hi"))

    gateway = make_gateway(answer)
    before, client = values(gateway), gateway.service.client
    session = client.create_session("m")
    lease = client.resume(session.id).lease
    client.append(session.id, lease, [message({"role": "user", "content": "hello"})])
    during = values(gateway)
    client.suspend(session.id, lease)
    assert gateway.chat({"role": "user", "content": "hello"}).status_code == 200
    gateway.ended()
    after = values(gateway)
    asked: set[str] = {name for query in queries().values() for name in metrics_of(query) if ":" not in name}
    moved: dict[str, Any] = {name: (before.get(name, 0.0), during.get(name), after.get(name)) for name in asked}
    assert not [name for name, seen in moved.items() if len(set(seen)) < 2 and name not in ELSEWHERE]
    assert asked > ELSEWHERE
