"""The orderings that a tier can have. Each says what a waiting session is worth; the least valuable leaves first."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from agentstate.lookahead.forecast import Forecast, blind_rate
from agentstate.lookahead.planner import index


class Wait(NamedTuple):
    """A session that waits: what is forecast, how long it has waited, and what its ``n_bytes`` would cost it if they
    were missing."""

    forecast: Forecast | None
    waited_s: float
    cost_s: float
    n_bytes: int


Policy = Callable[[Wait], float]


def lru(wait: Wait) -> float:
    """The least recently used leaves first, whatever is forecast."""
    return blind_rate(max(0.0, wait.waited_s))


def ttl(seconds: float) -> Policy:
    """Who has waited for ``seconds`` or less is pinned, which is an infinite worth; else the least recently used leaves
    first. A published rule, to compare with."""

    return partial(_pinned, seconds)


def _pinned(seconds: float, wait: Wait) -> float:
    return math.inf if wait.waited_s <= seconds else lru(wait)


def planner(wait: Wait) -> float:
    """The index."""
    return index(*wait)
