"""``/metrics``, for Prometheus: of all workers of the service, whichever of them answers.

With several workers each counts in a file of its own, which outlives it: no counter falls when a worker dies. Rows are
counted in SQL at most every ``COUNT_S``, so that frequent scrapes cost nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from fastapi import APIRouter, Request, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
    values,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from agentstate.lookahead.calibration import DECILES, Calibration
from agentstate.lookahead.forecast import Forecast
from agentstate.sql.database import Database, now_us
from agentstate.sql.models import SessionStatus, leases, sessions

COUNT_S = 10.0
BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)

router = APIRouter(tags=["health"])


def count_in(directory: Path, worker: int) -> None:
    """From now on this process counts in files of a directory that all workers share. One that is started again goes
    on with what the worker before it has counted."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    # The library chooses this when it is imported, which the parent of the workers has done.
    values.ValueClass = values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call]


class Metrics:
    """The metrics of one service. ``directory`` is where its workers count, if there are several."""

    def __init__(self, database: Database, directory: Path | None = None):
        self.registry = CollectorRegistry()
        self._request_seconds = Histogram(
            "agentstate_request_seconds",
            "Time to answer, by route; of a stream, how long it lasted.",
            ["method", "route", "status"],
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self._series: dict[tuple[str, str, int], Histogram] = {}
        self.suspends = Counter(
            "agentstate_suspends", "Suspends, by what was known of the KV.", ["kv_state"], registry=self.registry
        )
        self.resumes = Counter(
            "agentstate_resumes",
            "Resumes, by what was known of the KV and whether the engine can use it.",
            ["kv_state", "valid"],
            registry=self.registry,
        )
        self.gateway_requests = Counter(
            "agentstate_gateway_requests",
            "Requests to the gateway, by API and by how they came to their session; degraded: without the database.",
            ["api", "session"],
            registry=self.registry,
        )
        self.gateway_begin_seconds = Histogram(
            "agentstate_gateway_begin_seconds",
            "Time in which a request found its session and took its lease.",
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self.gateway_broken_streams = Counter(
            "agentstate_gateway_broken_streams",
            "Streams that ended with an error.",
            ["api"],
            registry=self.registry,
        )
        self.notices = Counter(
            "agentstate_notices",
            "Messages to engines about sessions that wait, by what became of them: what the engine answered; unknown, "
            "if it does not know them; unreachable; refused; dropped, if too many waited.",
            ["state"],
            registry=self.registry,
        )
        # Of all tenants together: no label tells one from another.
        self.forecast_waits = Counter(
            "agentstate_forecast_waits",
            "Waits that have ended, by the decile of their forecast that they fell into: a tenth each if forecasts are "
            "right.",
            ["kind", "decile"],
            registry=self.registry,
        )
        self.forecast_log_loss = Counter(
            "agentstate_forecast_log_loss",
            "Of waits that had been announced: the sum of the negative logarithms of the probabilities that were given "
            "to what happened, by announcements and by what had been learned without them. Smaller is better.",
            ["kind", "by"],
            registry=self.registry,
        )
        self.announced_waits = Counter("agentstate_announced_waits", "Such waits.", ["kind"], registry=self.registry)
        self._exposed = self.registry
        if directory is not None:
            self._exposed = CollectorRegistry()
            MultiProcessCollector(self._exposed, str(directory))  # type: ignore[no-untyped-call]
        self._rows = _Rows(database)
        for registry in {self.registry, self._exposed}:
            registry.register(self._rows)

    def took(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request was answered. Used on one event loop."""
        key = (method, route, status)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = self._request_seconds.labels(method, route, str(status))
        series.observe(seconds)

    def exposition(self) -> bytes:
        """The metrics in Prometheus' text format. Raises DatabaseError."""
        self._rows.count()
        return generate_latest(self._exposed)


class CountedCalibration(Calibration):
    """Counts how true forecasts come in the metrics, too."""

    def __init__(self, metrics: Metrics):
        super().__init__()
        self._metrics = metrics

    def ended(self, kind: str, forecast: Forecast, seconds: float | None, waited_s: float = 0.0) -> int:
        if kind not in self.deciles:
            # Also those that none has fallen into yet: a share needs all of them.
            for number in range(DECILES):
                self._metrics.forecast_waits.labels(kind, str(number + 1))
        found = super().ended(kind, forecast, seconds, waited_s)
        self._metrics.forecast_waits.labels(kind, str(found + 1)).inc()
        return found

    def scored(self, kind: str, announced: float, learned: float) -> None:
        super().scored(kind, announced, learned)
        self._metrics.forecast_log_loss.labels(kind, "announced").inc(max(0.0, -announced))
        self._metrics.forecast_log_loss.labels(kind, "learned").inc(max(0.0, -learned))
        self._metrics.announced_waits.labels(kind).inc()


class _Rows(Collector):
    """What SQL had when it was counted last."""

    def __init__(self, database: Database):
        self._database = database
        self._counted_s = float("-inf")
        self._by_status: dict[str, int] = {}
        self._valid = 0

    def count(self) -> None:
        """Count, unless that was done a moment ago. Raises DatabaseError."""
        if time.monotonic() - self._counted_s <= COUNT_S:
            return
        with self._database.read() as connection:
            counted = connection.execute(
                sa.select(sessions.c.status, sa.func.count().label("number"))
                .where(sessions.c.deleted_us.is_(None))
                .group_by(sessions.c.status)
            )
            self._by_status = {row.status: row.number for row in counted}
            self._valid = connection.execute(
                sa.select(sa.func.count()).select_from(leases).where(leases.c.expires_us > now_us())
            ).scalar_one()
        self._counted_s = time.monotonic()

    def collect(self) -> Iterator[Metric]:
        by_status = GaugeMetricFamily("agentstate_sessions", "Sessions, by status.", labels=["status"])
        for status in SessionStatus:
            by_status.add_metric([status], self._by_status.get(status, 0))
        yield by_status
        yield GaugeMetricFamily("agentstate_leases", "Leases that are valid now.", self._valid)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def read(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    metrics: Metrics = request.app.state.service.metrics
    return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
