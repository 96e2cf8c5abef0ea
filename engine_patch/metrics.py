"""AgentState's counters among SGLang's own: `/metrics` of an engine that runs with ``--enable-metrics``."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from agentstate.fleet.engines import Engine

if TYPE_CHECKING:
    # Which needs torch; the documentation's list of metrics is made without it.
    from engine_patch.restore import Restored

# The counters of `AgentStateLinker.stat` that are exported, by their place there: the metric's name, and what it is.
_COUNTERS = {
    ("spill", "pages_spilled"): ("spilled_pages", "Pages written to the page store."),
    ("spill", "bytes_spilled"): ("spilled_bytes", "Bytes of KV written to the page store."),
    ("spill", "pages_known"): ("known_pages", "Pages offered again that were stored already."),
    ("spill", "pages_linked"): ("linked_pages", "Pages not written because another engine of the machine had."),
    ("spill", "pages_refused"): ("refused_pages", "Pages not stored because too much waited to be written."),
    ("spill", "pages_skipped"): (
        "skipped_pages",
        "Pages not stored because the drive hung, or spilling was off.",
    ),
    ("spill", "pages_failed"): ("unwritten_pages", "Pages that could not be written."),
    ("spill", "pages_over_budget"): (
        "over_budget_pages",
        "Pages of requests without a session not stored because as much as a day may have had been written.",
    ),
    ("spill", "pages_one_shot"): (
        "one_shot_pages",
        "Pages of requests without a session not stored because no second request had used them.",
    ),
    ("spill", "extents_merged"): ("merged_extents", "Small extents that were replaced by larger ones."),
    ("restore", "restores"): ("restores", "Batches of requests whose pages were restored."),
    ("restore", "pages_restored"): ("restored_pages", "Pages verified and written to the device."),
    ("restore", "bytes_read"): ("read_bytes", "Bytes read from the page store to restore pages."),
    ("restore", "bytes_straight"): ("straight_read_bytes", "Of these, those that were read straight into the KV pool."),
    ("restore", "pages_host"): ("host_restored_pages", "Of the restored pages, those that came from the host tier."),
    ("restore", "bytes_host"): ("host_restored_bytes", "Bytes that came from the host tier, and not from the drive."),
    ("restore", "pages_shared"): ("shared_restored_pages", "Of the restored pages, those of the shared store."),
    ("restore", "bytes_chosen"): ("chosen_bytes", "Bytes that forwards waited for because attention chose their rows."),
    ("restore", "bytes_before_token"): (
        "read_before_token_bytes",
        "Bytes read before a first token, of what is restored by choice.",
    ),
    ("restore", "seconds"): ("restore_seconds", "Time in which pages were restored."),
    ("restore", "first_layer_s"): ("first_layer_seconds", "Time until the first layer of a restore was there."),
    ("restore", "pages_failed"): ("failed_pages", "Pages that were dropped because they were damaged or unreadable."),
    ("restore", "pages_unread"): ("unread_pages", "Pages that could not be read this time, and were kept."),
    ("restore", "requests_failed"): (
        "recomputed_requests",
        "Requests recomputed because a page failed or did not come.",
    ),
    ("restore", "timed_out"): ("timed_out_restores", "Restores abandoned because the drive did not answer."),
    ("restore", "forward_wait_s"): ("forward_wait_seconds", "Time in which forwards waited for a layer."),
    ("reads", "awaited"): ("awaited_read_bytes", "Bytes that were read while a forward waited for them."),
    ("reads", "demand"): ("demand_read_bytes", "Bytes that were read for requests that were queued."),
    ("reads", "due"): ("due_read_bytes", "Bytes that were read because somebody had said when they are needed."),
    ("reads", "planned"): ("planned_read_bytes", "Bytes that were read in case they are needed."),
    ("preload", "preloads"): ("preloads", "Restores beside running requests, and prefetches to the device."),
    ("preload", "pages"): ("preloaded_pages", "Pages that they brought to the device."),
    ("preload", "failed"): ("failed_preloads", "Preloads of which nothing was used."),
    ("preload", "requests"): ("deferred_requests", "Requests deferred until their pages had been preloaded."),
    ("preload", "followed"): ("following_requests", "Requests that waited a step for what another had just restored."),
    ("order", "delayed"): ("delayed_requests", "Requests that later ones with less to bring were put before."),
    ("order", "aged"): ("aged_requests", "Of these, those that went first in the end because they had waited long."),
    ("foresight", "foreseen"): ("forecasts", "Forecasts of when a session is back that were taken."),
    ("foresight", "ignored"): ("ignored_forecasts", "Forecasts that came too late, or for sessions not served here."),
    ("foresight", "fetched"): ("fetched_contexts", "Contexts that were brought to the device before their request."),
    ("foresight", "used"): ("used_fetches", "Of these, those that their request found there."),
    ("foresight", "wasted"): ("wasted_fetches", "Of these, those that left the device before."),
    ("foresight", "fetched_bytes"): ("fetched_context_bytes", "Bytes that fetches brought to the device."),
    ("foresight", "used_bytes"): ("used_fetch_bytes", "Of these, those that their request found there."),
    ("foresight", "wasted_bytes"): ("wasted_fetch_bytes", "Of these, those that left the device before."),
    ("foresight", "left"): ("left_fetches", "Wasted fetches whose request was still expected."),
    ("foresight", "left_bytes"): ("left_fetch_bytes", "Bytes of these."),
    ("foresight", "wrong"): ("wrong_fetches", "Wasted fetches whose forecast was wrong."),
    ("foresight", "wrong_bytes"): ("wrong_fetch_bytes", "Bytes of these."),
    ("foresight", "late"): ("late_fetches", "Fetches that were under way when their request came."),
    ("foresight", "cancelled"): ("cancelled_fetches", "Fetches that came to nothing."),
    ("received", "requests"): ("received_requests", "Requests that another engine had prefilled."),
    ("received", "silent"): (
        "silent_received_requests",
        "Of these, those not stored because that engine did not say what it computes with.",
    ),
    ("received", "unlike"): (
        "unlike_received_requests",
        "Of these, those not stored because that engine computes with other weights, adapters or flags.",
    ),
    ("break_even", "computed"): ("break_even_requests", "Requests computed because restoring would take longer."),
    ("store", "pages_evicted"): ("evicted_pages", "Pages that were evicted for room."),
    ("store", "pages_evicted_needed"): ("evicted_needed_pages", "Evicted pages that a live manifest needed."),
    ("store", "pages_dropped"): ("dropped_pages", "Pages that were dropped because they were wrong."),
    ("store", "pages_vanished"): ("vanished_pages", "Pages whose files were deleted or replaced by others."),
    ("store", "pages_erased"): ("erased_pages", "Pages that were erased with the sessions that they were of."),
    ("host", "pages_demoted"): ("demoted_pages", "Pages copied from the device to the host tier."),
    ("host", "pages_fetched"): ("fetched_pages", "Pages read from the page store to the host tier."),
    ("host", "pages_refused"): ("host_refused_pages", "Pages for which nothing in the host tier was to leave."),
    ("host", "pages_evicted"): ("host_evicted_pages", "Pages that left the host tier for others."),
    ("host", "pages_wrong"): (
        "host_wrong_pages",
        "Pages dropped from the host tier because they were wrong.",
    ),
    ("sharing", "published"): ("published_extents", "Extents that are in the shared store and were stored here."),
    ("sharing", "bytes"): ("published_bytes", "Bytes that were written to the shared store."),
    ("sharing", "failed"): ("failed_publications", "Extents that the shared store did not take, which is tried again."),
    ("sharing", "evicted"): ("unpublished_evictions", "Pages that were evicted before they were published to be kept."),
    ("sharing", "over_quota"): ("over_quota_publications", "Extents not published: their account has its quota."),
    ("sharing", "deleted"): ("deleted_extents", "Extents that were deleted in the shared store."),
    ("shared", "extents_rejected"): ("rejected_extents", "Extents of the shared store not used for a wrong page."),
    ("prefetch", "issued"): ("prefetches", "Reads begun before their request had device memory."),
    ("prefetch", "used"): ("used_prefetches", "Of these, those that a request used."),
    ("prefetch", "wasted"): ("wasted_prefetches", "Of these, those that expired or were abandoned."),
}
_GAUGES = {
    ("store", "pages"): ("stored_pages", "Pages in the page store."),
    ("store", "bytes"): ("stored_bytes", "Bytes of extents in the page store."),
    ("wear", "bytes_day"): ("written_bytes_day", "Bytes written to the pages' drive in the last 24 hours."),
    ("spill", "waiting"): ("waiting_spills", "Offers and manifests that wait for the spilling thread."),
    ("preload", "under_way"): ("preloads_under_way", "Preloads that are under way."),
    ("preload", "deferred"): ("waiting_requests", "Requests that are deferred now."),
    ("host", "pages"): ("host_pages", "Pages in the host tier."),
    ("host", "bytes"): ("host_bytes", "Memory of the host tier that they take."),
    ("shared", "available"): ("shared_store_available", "Whether the shared store is in use: 1 or 0."),
    ("shared", "extents"): ("shared_extents", "Extents that are known of the shared store."),
    ("shared", "pages"): ("shared_pages", "Pages in these."),
    ("sharing", "waiting"): ("waiting_publications", "Sessions whose KV is being published."),
    ("staged_bytes",): ("staged_bytes", "Staging memory with pages that were read and are not yet on the device."),
}
# Of restores, all pools together: the name, what it is, and the powers of ten whose multiples by 1, 2 and 5 bound the
# buckets.
_HISTOGRAMS = (
    ("restore_duration_seconds", "Time in which the pages of a batch were restored.", range(-3, 2)),
    ("restore_bytes_per_second", "How fast the pages of a batch were restored.", range(7, 11)),
    ("layer_wait_seconds", "How long a forward waited for a layer that was restored.", range(-5, 1)),
)


class Metrics:
    """Prometheus metrics of one rank. Pools beside full attention are told apart by the label ``pool``."""

    def __init__(self, engine: Engine):
        # Late: SGLang sets the directory through which its processes share samples before anyone imports the client.
        from prometheus_client import Counter, Gauge, Histogram

        self._labels = {"model_name": engine.model, "tp_rank": str(engine.rank)}
        if engine.dp_size > 1:
            self._labels["dp_rank"] = str(engine.dp_rank)
        names = [*self._labels, "pool"]
        self._counters = {
            place: Counter(f"agentstate:{name}_total", text, names) for place, (name, text) in _COUNTERS.items()
        }
        self._gauges = {
            place: Gauge(f"agentstate:{name}", text, names, multiprocess_mode="mostrecent")
            for place, (name, text) in _GAUGES.items()
        }
        self._restore_seconds, self._restore_rate, self._layer_wait = (
            Histogram(
                f"agentstate:{name}",
                text,
                list(self._labels),
                buckets=[step * 10.0**power for power in powers for step in (1, 2, 5)],
            ).labels(**self._labels)
            for name, text, powers in _HISTOGRAMS
        )
        # From which tier prompts came, by what was waited for before.
        kinds = [*self._labels, "gap", "tier"]
        self._hits = {
            "tokens": Counter("agentstate:prompt_tokens_by_tier_total", "Tokens of prompts, by where from.", kinds),
            "requests": Counter("agentstate:prompts_by_tier_total", "Requests that took tokens from there.", kinds),
        }
        self._penalty = Histogram(
            "agentstate:penalty_seconds",
            "How long a request waited for reads, or for device memory; those that waited for neither are not here.",
            [*self._labels, "cause"],
            buckets=[step * 10.0**power for power in range(-3, 2) for step in (1, 2, 5)],
        )
        self._told: dict[tuple[str, ...], float] = {}
        self._restored: deque[Restored] = deque()
        self._waited: deque[tuple[str, float]] = deque()

    def restored(self, restored: Restored) -> None:
        """A batch has been restored. The next `update` reports it: the scheduler must not wait for that."""
        self._restored.append(restored)

    def waited(self, cause: str, seconds: float) -> None:
        """A request has waited; reported like `restored`."""
        self._waited.append((cause, seconds))

    def update(self, stat: dict[str, Any]) -> None:
        """Report what has changed since the last time."""
        while self._waited:
            cause, seconds = self._waited.popleft()
            self._penalty.labels(**self._labels, cause=cause).observe(seconds)
        for gap, of_gap in stat.get("served", {}).get("hits", {}).items():
            for tier, of_tier in of_gap.items():
                for what, counter in self._hits.items():
                    grown = of_tier[what] - self._told.get(("hits", gap, tier, what), 0)
                    if grown:
                        counter.labels(**self._labels, gap=gap, tier=tier).inc(grown)
                        self._told["hits", gap, tier, what] = of_tier[what]
        while self._restored:
            restored = self._restored.popleft()
            self._restore_seconds.observe(restored.seconds)
            self._restore_rate.observe(restored.n_bytes / restored.seconds)
            for wait_s in restored.layer_waits_s:
                self._layer_wait.observe(wait_s)
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
