"""Whether stored pages are worth restoring: a short prefix may be computed in less time than it is read.

Both costs are estimated from what this engine did lately. A token's cost of computing is the time that it adds to a
prefill, at its place in the context. The cost of restoring is the time that the forward spends waiting, which is less
than a restore takes: the two overlap.

The engine restores until computing is known to be faster, by a margin and beyond the error of the measurements. While
these are few, or contradict one another, it restores. Now and then it restores all the same, since what is never
restored is never measured again. Imports neither torch nor sglang.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

_MARGIN = 1.25
_EXPLORE = 32  # one in so many requests that would be computed is restored
_LEAST = 8  # measurements needed beyond those that determine a line
_FADE = 0.99  # weight of an observation relative to the one after it
_SHORTEST_S = 1e-3  # errors of shorter times are relative to this


class Word(IntEnum):
    """One rank's verdict on a request's stored pages. The least word of all ranks counts, because a step takes as long
    as its slowest rank."""

    COMPUTE = 0
    """Computing is known to be faster."""
    SHARED = 1
    """Restoring them needs the shared store, for which no forward is to wait."""
    RESTORE = 2
    STAGED = 3
    """They are in host memory, or on their way there: they cost next to nothing."""


@dataclass
class BreakEvenStats:
    """Counters since the engine started: requests whose stored pages were ``computed`` because that was faster, and
    requests that were restored although computing would have been faster (``explored``)."""

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
        """A lower and an upper bound of the seconds, two standard errors from the line; 0 and infinity while nothing is
        known. The less the observations were like ``features``, the wider the bounds."""
        unknown = (0.0, math.inf)
        if self._count < len(features) + _LEAST:
            return unknown
        scale = np.sqrt(np.diag(self._products))
        if not scale.all():
            return unknown
        products = self._products / np.outer(scale, scale)
        # If the observations vary in too few directions, the others are unknown.
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
    """Learns from every step that computed part of a prompt, and decides for every request with stored pages. Used by
    one thread.

    Each rank has measurements of its own (`word`), but all ranks must decide alike (`computes`), also which requests
    to restore only for measuring: if one rank alone restored, none would.
    """

    def __init__(self) -> None:
        self.stats = BreakEvenStats()
        self._prefill = Line(3)
        self._wait = Line(2)
        # By waiting request: how many of its pages were asked about, and the answer.
        self._asked: dict[str, tuple[int, bool]] = {}
        self._unexplored = 0

    def stepped(self, parts: Sequence[tuple[int, int]], seconds: float) -> None:
        """Record a step that took ``seconds`` and only computed prompts. ``parts`` tells, for each request, how many
        tokens it had and how many new ones were computed."""
        self._prefill.observe(_work(parts, steps=1), seconds)

    def restored(self, parts: Sequence[tuple[int, int]], seconds: float, n_bytes: int, waited_s: float) -> None:
        """Record a step that also restored ``n_bytes`` from disk and waited for them. Their cost is that wait, but at
        most the time beyond what the step would have taken anyway."""
        _, without_s = self._prefill.bounds(_work(parts, steps=1))
        if without_s < math.inf:
            self._wait.observe((1, n_bytes), min(waited_s, max(0.0, seconds - without_s)))

    def word(self, cached: int, tokens: int, n_bytes: int) -> Word:
        """This rank's verdict on ``tokens`` tokens whose pages, ``n_bytes``, are stored, after ``cached`` tokens that
        are on the device."""
        restore_s, _ = self._wait.bounds((1, n_bytes))
        return Word.RESTORE if self._computing_takes(cached, tokens) >= restore_s else Word.COMPUTE

    def word_of_shared(self, cached: int, tokens: int, restore_s: float) -> Word:
        """The same for tokens whose pages the shared store has, which takes so long to give them."""
        return Word.SHARED if self._computing_takes(cached, tokens) >= restore_s else Word.COMPUTE

    def _computing_takes(self, cached: int, tokens: int) -> float:
        """As much, in seconds, as restoring may take."""
        # There is a step anyway, for what comes after these tokens.
        _, compute_s = self._prefill.bounds(_work([(cached, tokens)], steps=0))
        return compute_s * _MARGIN

    def computes(self, rid: str, pages: int, word: int) -> bool:
        """Whether to compute a request's stored pages all the same. All ranks have agreed on ``pages`` and ``word``, so
        they get the same answer. It stays the same while the request waits, and counts once; only pages staged since
        are restored in any case."""
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
        """Forget the answers to requests that are no longer ``queued``."""
        if self._asked:
            still = queued()
            self._asked = {rid: answer for rid, answer in self._asked.items() if rid in still}

    @property
    def kept(self) -> int:
        """How many requests' answers are remembered."""
        return len(self._asked)


def _work(parts: Sequence[tuple[int, int]], steps: int) -> tuple[float, float, float]:
    """The features of a prefill's time: that there is one, its new tokens, and what each of them attends to."""
    return steps, sum(new for _, new in parts), sum(new * (had + new / 2) for had, new in parts)
