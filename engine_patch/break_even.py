"""Whether stored pages are worth restoring: a short prefix may be computed in less time than it is read.

Both are known from what this engine did lately. Computing costs what a prefill takes longer by for a token more, at
its place in the context. Restoring costs what the forward takes longer by because it waits, which is less than what a
restore takes: the one runs under the other.

Restoring is what is done until computing is known to be faster, by a margin and beyond what the measurements leave
open: with few of them, or with contradicting ones, nothing is left to chance. Now and then it is done all the same,
since what is never restored is never measured again. Imports neither torch nor sglang.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MARGIN = 1.25
_EXPLORE = 32  # one of so many that would be computed is restored
_LEAST = 8  # measurements beyond those that a line is fitted through
_FADE = 0.99  # what an observation counts beside the one after it
_SHORTEST_S = 1e-3  # of what is shorter, the error is taken to be that of this
_REMEMBERED = 1000


@dataclass
class BreakEvenStats:
    """Counters since the engine started: requests whose stored pages were ``computed`` because that was faster, and
    those that were restored although it would have been (``explored``)."""

    computed: int = 0
    explored: int = 0


class Line:
    """Seconds as a linear function of ``features`` numbers, by least squares of relative errors; the older an
    observation, the less it counts."""

    def __init__(self, features: int):
        self._count = 0
        self._weight = 0.0
        self._products = np.zeros((features, features))
        self._moments = np.zeros(features)
        self._square = 0.0

    def observe(self, features: Sequence[float], seconds: float) -> None:
        x = np.asarray(features, dtype=float) / max(seconds, _SHORTEST_S)
        y = seconds / max(seconds, _SHORTEST_S)
        self._count += 1
        self._weight = _FADE * self._weight + 1
        self._products = _FADE * self._products + np.outer(x, x)
        self._moments = _FADE * self._moments + y * x
        self._square = _FADE * self._square + y * y

    def bounds(self, features: Sequence[float]) -> tuple[float, float]:
        """What the seconds lie between, two standard errors away from the line: 0 and infinity while nothing is known.
        Wider, the less the observations were like ``features``."""
        unknown = (0.0, math.inf)
        if self._count < len(features) + _LEAST:
            return unknown
        scale = np.sqrt(np.diag(self._products))
        if not scale.all():
            return unknown
        products = self._products / np.outer(scale, scale)
        # Where what was observed varies in too few directions, the others are unknown.
        if np.linalg.eigvalsh(products)[0] < 1e-9:
            return unknown
        inverse = np.linalg.inv(products)
        line = inverse @ (self._moments / scale)
        at = np.asarray(features, dtype=float) / scale
        freedom = max(1.0, self._weight - len(features))
        variance = max(0.0, self._square - float(line @ (self._moments / scale))) / freedom
        middle, error = float(line @ at), 2 * math.sqrt(variance * float(at @ inverse @ at))
        return max(0.0, middle - error), max(0.0, middle + error)


class BreakEven:
    """Told of every step that computed something of a prompt, and asked for every request with stored pages. Used by
    one thread."""

    def __init__(self) -> None:
        self.stats = BreakEvenStats()
        self._prefill = Line(3)
        self._wait = Line(2)
        self._asked: OrderedDict[str, tuple[int, bool]] = OrderedDict()
        self._unexplored = 0

    def stepped(self, parts: Sequence[tuple[int, int]], seconds: float) -> None:
        """A step took ``seconds`` to compute prompts alone: of each request so many new tokens after so many that it
        had (``parts``: had, new)."""
        self._prefill.observe(_work(parts, steps=1), seconds)

    def restored(self, parts: Sequence[tuple[int, int]], seconds: float, n_bytes: int, waited_s: float) -> None:
        """The same of a step that restored ``n_bytes`` from disk, and waited for them: not more of it than is beyond
        what it would have taken anyway is their cost."""
        _, without_s = self._prefill.bounds(_work(parts, steps=1))
        if without_s < math.inf:
            self._wait.observe((1, n_bytes), min(waited_s, max(0.0, seconds - without_s)))

    def computes(self, rid: str, cached: int, tokens: int, n_bytes: int) -> bool:
        """Whether ``tokens`` tokens of a request should be computed, although their pages, ``n_bytes``, are stored. It
        has ``cached`` tokens before them. The answer to a request stays the same, and counts once."""
        known = self._asked.pop(rid, None)
        if known is None or known[0] != tokens:
            known = tokens, self._decide(cached, tokens, n_bytes)
        self._asked[rid] = known
        if len(self._asked) > _REMEMBERED:
            self._asked.popitem(last=False)
        return known[1]

    def _decide(self, cached: int, tokens: int, n_bytes: int) -> bool:
        # A step there is anyway, for what comes after these tokens.
        _, compute_s = self._prefill.bounds(_work([(cached, tokens)], steps=0))
        restore_s, _ = self._wait.bounds((1, n_bytes))
        if compute_s * _MARGIN >= restore_s:
            return False
        self._unexplored += 1
        if self._unexplored == _EXPLORE:
            self._unexplored = 0
            self.stats.explored += 1
            return False
        self.stats.computed += 1
        return True


def _work(parts: Sequence[tuple[int, int]], steps: int) -> tuple[float, float, float]:
    """What the time of a prefill is linear in: that there is one, its new tokens, and what each of them attends to."""
    return steps, sum(new for _, new in parts), sum(new * (had + new / 2) for had, new in parts)
