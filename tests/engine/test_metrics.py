from __future__ import annotations

from dataclasses import asdict
from typing import Any

import prometheus_client
import pytest
from deployed import labels_of, metrics_of, queries

from agentstate.fleet.engines import Engine
from engine_patch.feeds import Source
from engine_patch.metrics import _COUNTERS, _GAUGES, Metrics
from engine_patch.restore import Restored, RestoredRequest
from engine_patch.served import ServedStats

LABELS = {"model_name": "m", "tp_rank": "1"}


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    """One for all tests: it registers itself with the process."""
    engine = Engine(
        id="eng_1",
        node="n",
        rank=1,
        control_address="tcp://h:1",
        base_url="http://h",
        model="m",
        fingerprint="f",
        pages_dir="/p",
    )
    return Metrics(engine)


def sample(name: str, **labels: str) -> float | None:
    return prometheus_client.REGISTRY.get_sample_value(f"agentstate:{name}", {**LABELS, **labels})


def stat(**pools: dict[str, dict[str, float]]) -> dict[str, object]:
    return {"restore": {"pages_restored": 7}, "store": {"pages": 9}, "staged_bytes": 5, "pools": pools}


def test_counters_grow_by_what_has_been_counted_since_and_gauges_are_as_they_are(metrics: Metrics) -> None:
    metrics.update(stat())
    assert sample("restored_pages_total", pool="kv") == 7
    assert (sample("stored_pages", pool="kv"), sample("staged_bytes", pool="kv")) == (9, 5)
    metrics.update({**stat(swa={"restore": {"pages_restored": 2}}), "restore": {"pages_restored": 10}})
    assert sample("restored_pages_total", pool="kv") == 10
    assert sample("restored_pages_total", pool="swa") == 2


def test_every_restore_is_in_the_histograms(metrics: Metrics) -> None:
    before = sample("restore_duration_seconds_count") or 0
    two = {
        "a": RestoredRequest(3, 2_000_000_000, frozenset({Source.COLD})),
        "b": RestoredRequest(1, 10**9, frozenset({Source.COLD})),
    }
    metrics.restored(Restored(two, 1.5, 0.03, (0.03, 0.0)))
    metrics.restored(Restored({"c": RestoredRequest(1, 30_000_000, frozenset({Source.HOST}))}, 0.01))
    metrics.update(stat())
    assert sample("restore_duration_seconds_count") == before + 2
    assert sample("restore_duration_seconds_bucket", le="0.01") == 1
    assert sample("restore_duration_seconds_bucket", le="2.0") == 2
    assert sample("restore_bytes_per_second_sum") == pytest.approx(5e9)
    assert (sample("layer_wait_seconds_count"), sample("layer_wait_seconds_sum")) == (2, 0.03)
    metrics.update(stat())
    assert sample("restore_duration_seconds_count") == before + 2


def test_where_prompts_came_from_and_what_requests_waited_for_is_exported(metrics: Metrics) -> None:
    served = ServedStats()
    served.hits["tool"]["nvme"].update(tokens=640, requests=2)
    metrics.waited("memory", 0.3)
    metrics.update({**stat(), "served": asdict(served)})
    served.hits["tool"]["nvme"].update(tokens=704, requests=3)
    metrics.update({**stat(), "served": asdict(served)})
    labels = {"gap": "tool", "tier": "nvme"}
    assert sample("prompt_tokens_by_tier_total", **labels) == 704
    assert sample("prompts_by_tier_total", **labels) == 3
    assert sample("prompts_by_tier_total", gap="first", tier="nvme") is None
    assert (sample("penalty_seconds_sum", cause="memory"), sample("penalty_seconds_count", cause="reads")) == (
        0.3,
        None,
    )


def test_what_the_alerts_and_the_board_ask_for_moves_and_has_these_labels(metrics: Metrics) -> None:
    asked = {name: query for query in queries().values() for name in metrics_of(query) if ":" in name}
    assert len(asked) > 30
    before = {name: total(name) for name in asked}
    served = ServedStats()
    # More than what the tests before have told.
    served.hits["tool"]["nvme"].update(tokens=10_000, requests=100)
    metrics.waited("reads", 0.2)
    metrics.restored(Restored({"a": RestoredRequest(1, 10**9, frozenset({Source.COLD}))}, 1.5, 0.03, (0.03,)))
    grown: dict[str, Any] = {"served": asdict(served), "pools": {}}
    for number, place in enumerate((*_COUNTERS, *_GAUGES), 1000):
        at = grown
        for part in place[:-1]:
            at = at.setdefault(part, {})
        at[place[-1]] = number
    metrics.update(grown)
    assert not [name for name in asked if total(name) == before[name]]
    for name, query in asked.items():
        known = {label for sample in samples(name) for label in sample.labels}
        assert labels_of(query) <= known, query


def samples(name: str) -> list[Any]:
    """Of one name, those of this engine's model."""
    own = (sample for family in prometheus_client.REGISTRY.collect() for sample in family.samples)
    return [sample for sample in own if sample.name == name and sample.labels["model_name"] == "m"]


def total(name: str) -> float:
    return sum(sample.value for sample in samples(name))
