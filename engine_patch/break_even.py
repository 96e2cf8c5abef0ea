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
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

_MARGIN = 1.25
_EXPLORE = 32  # one of so many that would be computed is restored
_LEAST = 8  # measurements beyond those that a line is fitted through
_FADE = 0.99  # what an observation counts beside the one after it
_SHORTEST_S = 1e-3  # of what is shorter, the error is taken to be that of this


class Word(IntEnum):
    """What one rank says about a request's stored pages. Of all ranks the least word counts, because a step takes as
    long as its slowest rank."""

    COMPUTE = 0
    """Computing is known to be faster."""
    RESTORE = 1
    STAGED = 2
    """They are in host memory, or on their way there: they cost next to nothing."""


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
    one thread.

    With several ranks each has measurements of its own (`word`), and all must decide alike (`computes`), also which
    requests are restored only to be measured: what one rank alone restores no rank does.
    """

    def __init__(self) -> None:
        self.stats = BreakEvenStats()
        self._prefill = Line(3)
        self._wait = Line(2)
        # Of each request that waits: how many of its pages were asked about, and the answer.
        self._asked: dict[str, tuple[int, bool]] = {}
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

    def word(self, cached: int, tokens: int, n_bytes: int) -> Word:
        """What this rank's measurements say about ``tokens`` tokens, whose pages, ``n_bytes``, are stored, after
        ``cached`` tokens that are on the device."""
        # A step there is anyway, for what comes after these tokens.
        _, compute_s = self._prefill.bounds(_work([(cached, tokens)], steps=0))
        restore_s, _ = self._wait.bounds((1, n_bytes))
        return Word.RESTORE if compute_s * _MARGIN >= restore_s else Word.COMPUTE

    def computes(self, rid: str, pages: int, word: int) -> bool:
        """Whether a request's stored pages are computed all the same. ``pages`` and ``word`` are what all ranks have
        agreed on, and so is the answer. It stays the same while the request waits, and counts once; only what has been
        staged since is restored in any case."""
        if word == Word.STAGED:
            return False
        known = self._asked.get(rid)
        if known is None or known[0] != pages:
            known = self._asked[rid] = pages, self._decide(word)
        return known[1]

    def _decide(self, word: int) -> bool:
        if word != Word.COMPUTE:
            return False
        self._unexplored += 1
        if self._unexplored == _EXPLORE:
            self._unexplored = 0
            self.stats.explored += 1
            return False
        self.stats.computed += 1
        return True

    def tidy(self, queued: Callable[[], Collection[str]]) -> None:
        """Forget what was answered to requests that are not ``queued`` any more."""
        if self._asked:
            still = queued()
            self._asked = {rid: answer for rid, answer in self._asked.items() if rid in still}

    @property
    def kept(self) -> int:
        """How many requests' answers are remembered."""
        return len(self._asked)


def _work(parts: Sequence[tuple[int, int]], steps: int) -> tuple[float, float, float]:
    """What the time of a prefill is linear in: that there is one, its new tokens, and what each of them attends to."""
    return steps, sum(new for _, new in parts), sum(new * (had + new / 2) for had, new in parts)
