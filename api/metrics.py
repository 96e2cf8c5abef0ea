"""``/metrics``, for Prometheus.

Rows are counted at most every ``COUNT_S``, so that frequent scrapes cost nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import sqlalchemy as sa
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from agentstate.fleet.operations import Operations
from agentstate.fleet.waits import Waits
from agentstate.sql.database import Database, now_us
from agentstate.sql.models import SessionStatus, leases, sessions

COUNT_S = 10.0
BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)

router = APIRouter(tags=["health"])


class Metrics:
    """The metrics of one application."""

    def __init__(self, database: Database, operations: Operations, waits: Waits | None):
        self._database = database
        self._counted_s = float("-inf")
        self.registry = CollectorRegistry()
        self.request_seconds = Histogram(
            "agentstate_request_seconds",
            "Time to answer, by route; of a stream, how long it lasted.",
            ["method", "route", "status"],
            buckets=BUCKETS_S,
            registry=self.registry,
        )
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
        self.registry.register(_Notices(operations))
        if waits is not None:
            self.registry.register(_Forecasts(waits))
        self._sessions = Gauge("agentstate_sessions", "Sessions, by status.", ["status"], registry=self.registry)
        self._leases = Gauge("agentstate_leases", "Leases that are valid now.", registry=self.registry)

    def exposition(self) -> bytes:
        """The metrics in Prometheus' text format. Raises DatabaseError."""
        if time.monotonic() - self._counted_s > COUNT_S:
            self._count()
        return generate_latest(self.registry)

    def _count(self) -> None:
        with self._database.read() as connection:
            counted = connection.execute(
                sa.select(sessions.c.status, sa.func.count().label("number"))
                .where(sessions.c.deleted_us.is_(None))
                .group_by(sessions.c.status)
            )
            by_status = {row.status: row.number for row in counted}
            valid = connection.execute(
                sa.select(sa.func.count()).select_from(leases).where(leases.c.expires_us > now_us())
            ).scalar_one()
        for status in SessionStatus:
            self._sessions.labels(status).set(by_status.get(status, 0))
        self._leases.set(valid)
        self._counted_s = time.monotonic()


class _Notices(Collector):
    """What became of notices to engines."""

    def __init__(self, operations: Operations):
        self._operations = operations

    def collect(self) -> Iterator[Metric]:
        told = CounterMetricFamily(
            "agentstate_notices",
            "Messages to engines about sessions that wait, by what became of them: what the engine answered; unknown, "
            "if it does not know them; unreachable; refused; dropped, if too many waited.",
            labels=["state"],
        )
        for state, number in sorted(self._operations.told.items()):
            told.add_metric([state], number)
        yield told


class _Forecasts(Collector):
    """How true forecasts came. Of all tenants together: no label tells one from another."""

    def __init__(self, waits: Waits):
        self._waits = waits

    def collect(self) -> Iterator[Metric]:
        calibration = self._waits.calibration
        ended = CounterMetricFamily(
            "agentstate_forecast_waits",
            "Waits that have ended, by the decile of their forecast that they fell into: a tenth each if forecasts are "
            "right.",
            labels=["kind", "decile"],
        )
        for kind, deciles in sorted(calibration.deciles.copy().items()):
            for number, count in enumerate(deciles, 1):
                ended.add_metric([kind, str(number)], count)
        yield ended
        loss = CounterMetricFamily(
            "agentstate_forecast_log_loss",
            "Of waits that had been announced: the sum of the negative logarithms of the probabilities that were given "
            "to what happened, by announcements and by what had been learned without them. Smaller is better.",
            labels=["kind", "by"],
        )
        announced = CounterMetricFamily("agentstate_announced_waits", "Such waits.", labels=["kind"])
        for kind, losses in sorted(calibration.losses.copy().items()):
            loss.add_metric([kind, "announced"], losses.announced)
            loss.add_metric([kind, "learned"], losses.learned)
            announced.add_metric([kind], losses.waits)
        yield loss
        yield announced


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def read(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    metrics: Metrics = request.app.state.service.metrics
    return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
