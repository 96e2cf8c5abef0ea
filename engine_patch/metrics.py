"""AgentState's counters among SGLang's own: `/metrics` of an engine that runs with ``--enable-metrics``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from agentstate.engines import Engine

# What of `AgentStateLinker.stat` is told, by its place there: the metric's name, and what it is.
_COUNTERS = {
    ("spill", "pages_spilled"): ("spilled_pages", "Pages written to the page store."),
    ("spill", "bytes_spilled"): ("spilled_bytes", "Bytes of KV written to the page store."),
    ("spill", "pages_known"): ("known_pages", "Pages offered again that were stored already."),
    ("spill", "pages_skipped"): ("skipped_pages", "Pages not written because too much waited to be written."),
    ("spill", "pages_failed"): ("unwritten_pages", "Pages that could not be written."),
    ("spill", "extents_merged"): ("merged_extents", "Small extents that were replaced by larger ones."),
    ("restore", "restores"): ("restores", "Batches of requests whose pages were restored."),
    ("restore", "pages_restored"): ("restored_pages", "Pages verified and written to the device."),
    ("restore", "bytes_read"): ("read_bytes", "Bytes read from the page store to restore pages."),
    ("restore", "bytes_straight"): ("straight_read_bytes", "Of these, those that were read straight into the KV pool."),
    ("restore", "seconds"): ("restore_seconds", "Time in which pages were restored."),
    ("restore", "first_layer_s"): ("first_layer_seconds", "Time until the first layer of a restore was there."),
    ("restore", "pages_failed"): ("failed_pages", "Pages that were read and not used: damaged or unreadable."),
    ("restore", "requests_failed"): ("recomputed_requests", "Requests recomputed because a page failed."),
    ("restore", "forward_wait_s"): ("forward_wait_seconds", "Time in which forwards waited for a layer."),
    ("break_even", "computed"): ("break_even_requests", "Requests computed because restoring would take longer."),
    ("store", "pages_evicted"): ("evicted_pages", "Pages that were evicted for room."),
    ("store", "pages_evicted_needed"): ("evicted_needed_pages", "Evicted pages that a live manifest needed."),
    ("store", "pages_dropped"): ("dropped_pages", "Pages that were dropped because they were wrong."),
    ("prefetch", "issued"): ("prefetches", "Reads begun before their request had device memory."),
    ("prefetch", "used"): ("used_prefetches", "Of these, those that a request used."),
    ("prefetch", "wasted"): ("wasted_prefetches", "Of these, those that expired or were given up."),
}
_GAUGES = {
    ("store", "pages"): ("stored_pages", "Pages in the page store."),
    ("store", "bytes"): ("stored_bytes", "Bytes of extents in the page store."),
    ("spill", "waiting"): ("waiting_spills", "Offers and manifests that wait for the spilling thread."),
    ("staged_bytes",): ("staged_bytes", "Staging memory with pages that were read and are not yet on the device."),
}


class Metrics:
    """Prometheus metrics of one rank. Pools beside full attention are told apart by the label ``pool``."""

    def __init__(self, engine: Engine):
        # Late: SGLang names the directory that its processes share their samples through before anyone imports it.
        from prometheus_client import Counter, Gauge

        self._labels = {"model_name": engine.model, "tp_rank": str(engine.rank)}
        names = [*self._labels, "pool"]
        self._counters = {
            place: Counter(f"agentstate:{name}_total", text, names) for place, (name, text) in _COUNTERS.items()
        }
        self._gauges = {
            place: Gauge(f"agentstate:{name}", text, names, multiprocess_mode="mostrecent")
            for place, (name, text) in _GAUGES.items()
        }
        self._told: dict[tuple[str, ...], float] = {}

    def update(self, stat: dict[str, Any]) -> None:
        """Tell what has changed since the last time."""
        for pool, of_pool in _pools(stat):
            for place, counter in self._counters.items():
                now, before = _at(of_pool, place), self._told.get((pool, *place), 0)
                counter.labels(**self._labels, pool=pool).inc(max(0, now - before))
                self._told[pool, *place] = now
            for place, gauge in self._gauges.items():
                gauge.labels(**self._labels, pool=pool).set(_at(of_pool, place))


def _pools(stat: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "kv", stat
    yield from stat["pools"].items()


def _at(stat: dict[str, Any], place: tuple[str, ...]) -> float:
    value: Any = stat
    for name in place:
        value = value.get(name, 0) if isinstance(value, dict) else 0
    return float(value)
