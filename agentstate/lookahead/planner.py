"""What a byte of a waiting session is worth on a tier.

**Objective.** A tier holds *M* bytes. Session *i* has *b* bytes of pages and waits; when it comes back, it costs *c*
seconds if they are not there. We choose at every moment which sessions to hold, so that the expected cost of misses is
least while Σ b ≤ M.

**Derivation.** Give the room a price: λ seconds of cost for each byte and second. With a price the sessions no longer
compete, and each has a problem of its own: when to stop paying. If a session that has waited *w* is held for up to *t*
more, it earns c · P(back within t | w) and pays λ · b · E[min(rest, t) | w], since the paying ends when it is back.
Holding is worth it as long as some *t* earns more than it pays, that is, while

    index = (c / b) · max over t of  P(back within t | w) / E[min(rest, t) | w]   >  λ

This is a Gittins index. λ is what room is worth at the margin, and equal for all sessions, so nobody needs to know it:
hold those with the largest indices that fit. One order therefore drives eviction (the least goes), demotion (the least
on the device goes to the host) and prefetch (what is not there, and is worth `MARGIN` times the least that is).

**What it becomes.** If the hazard falls, *t* → 0 is best, and the index is the hazard: the longer a session has waited,
the less it is worth, which is LRU. That is the case without a forecast. If the length of the wait is known, *t* is the
rest of it, and the index its reciprocal: who is back soonest is worth most, which is Bélády's rule.

Fetching is not free, and an index is an estimate. So what is to be fetched must be worth `MARGIN` times what it
displaces; of those that were tried, this margin fetched least and served best.
"""

from __future__ import annotations

import math
import sys

from agentstate.lookahead.forecast import Forecast, blind_rate

MARGIN = 4.0

_LEAST = sys.float_info.min
_LONGEST_S = 1e9  # beyond it sessions are worth the same: thirty years


def index(forecast: Forecast | None, waited_s: float, cost_s: float, n_bytes: int) -> float:
    """What a byte is worth, per second, of a session that has waited ``waited_s``, whose ``n_bytes`` would cost
    ``cost_s`` if they were missing. Positive and finite; comparable between sessions.

    Without a forecast, sessions of equal cost a byte are ordered exactly as by LRU. A wait that is negative or no
    number has just begun; a cost that is not positive is the least there is; sizes count from one byte.
    """
    waited_s = min(waited_s, _LONGEST_S) if waited_s > 0 else 0.0
    rate = blind_rate(waited_s) if forecast is None else forecast.rate(waited_s)
    value = rate * cost_s / max(1, n_bytes)
    return min(value, sys.float_info.max) if value > _LEAST else _LEAST


def worth_fetching(value: float, displaced: float = 0.0) -> bool:
    """Whether what has this index may displace what has the other one. Nothing is displaced where there is room."""
    return math.isfinite(value) and value >= MARGIN * displaced
