"""`agentstate doctor` beside a service and an engine's control endpoint."""

from __future__ import annotations

from typing import Any

import pytest
from stage import PATIENCE_S, Service, register
from test_tenants import key_for

from agentstate.cli import doctor_parts
from agentstate.cli.findings import Level, exit_status


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_parts, "_ANSWER_S", PATIENCE_S)


def test_an_engine_that_stores_nothing_says_why(service: Service, start_peer: Any) -> None:
    settings = service.app.state.service.settings.model_copy(update={"engine_timeout_s": 3600})
    off = {"ok": True, "off": "weights were updated from another process"}
    register(service.database, start_peer(lambda request: off).address)
    (found,) = doctor_parts.engines(settings)
    assert found.level is Level.FIX and "stores nothing" in found.what and "weights were updated" in found.measured
    off["off"] = ""
    assert [one.level for one in doctor_parts.engines(settings)] == [Level.OK]


def test_the_service_is_ready_and_takes_a_key(service: Service) -> None:
    settings, url = service.app.state.service.settings, service.base_url
    key = key_for(service, "acme")["Authorization"].removeprefix("Bearer ")
    assert [one.level for one in doctor_parts.service(settings, url, key)] == [Level.OK]
    for wrong in (None, "ags_wrong"):
        found = list(doctor_parts.service(settings, url, wrong))
        assert exit_status(found, strict=False) == 4 and "keys create" in found[0].command


def test_a_service_that_is_not_there(service: Service) -> None:
    settings = service.app.state.service.settings.model_copy(update={"port": 1})
    assert [one.level for one in doctor_parts.service(settings, None, None)] == [Level.SKIPPED]
    assert [one.level for one in doctor_parts.service(settings, service.base_url, None)] == [Level.OK]
    assert exit_status(list(doctor_parts.service(settings, "http://127.0.0.1:1", None)), strict=False) == 3
