"""How long a wait lasts, as a distribution on one fixed grid.

A wait falls in one of `BINS` bins: up to 1 ms, then quarter octaves up to a day, and *never* for all that lasts longer
or does not end. Within a bin all durations are equally likely.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from statistics import NormalDist
from typing import NamedTuple

PER_OCTAVE = 4
SHORTEST_S, LONGEST_S = 0.001, 86_400.0
_FINITE = math.ceil(math.log2(LONGEST_S / SHORTEST_S) * PER_OCTAVE) + 1
BINS = _FINITE + 1
NEVER = BINS - 1
"""The last bin."""
EDGES = (0.0, *(SHORTEST_S * 2 ** (step / PER_OCTAVE) for step in range(_FINITE)))
"""Bin *i* is from ``EDGES[i]``, which is not in it, to ``EDGES[i + 1]``, which is."""

_WIDTHS = tuple(end - start for start, end in zip(EDGES, EDGES[1:], strict=False))
_LOG_SHORTEST = math.log2(SHORTEST_S)
_DOUBT = 1e-6
_LEVELS = 255
_NORMAL = NormalDist()

# Without a forecast a wait has a Lomax distribution: P(longer than t) = (1 + t / BLIND_S) ** -BLIND_SHAPE. It has the
# published median of coding agents' tool calls (0.3 s), twice their p90 (13.6 s), and the tail that people add.
BLIND_SHAPE, BLIND_S = 0.5, 0.1


def bin_of(seconds: float) -> int:
    """The bin of a wait of ``seconds``: the first for one that is negative, `NEVER` for one longer than a day. Raises
    ValueError for one that is no number."""
    if seconds <= SHORTEST_S:
        return 0
    if seconds > EDGES[-1]:
        return NEVER
    return max(1, math.ceil((math.log2(seconds) - _LOG_SHORTEST) * PER_OCTAVE - 1e-9))


def blind_rate(waited_s: float) -> float:
    """How likely a wait without a forecast is to end now, per second, given that it has lasted ``waited_s``. It only
    falls, so the newest wait comes first."""
    return BLIND_SHAPE / (waited_s + BLIND_S)


class _Curve(NamedTuple):
    """For the index, at each of `EDGES`: the share of waits that last longer (``left``), how long waits have lasted on
    average if they are cut off there (``spent``), and the edge at which it pays most to give up (``until``)."""

    left: Sequence[float]
    spent: Sequence[float]
    until: Sequence[int]


class Forecast:
    """A distribution of how long a wait lasts. Immutable; equal if every bin is."""

    __slots__ = ("_curve", "_left", "_mass", "_packed")

    def __init__(self, mass: tuple[float, ...]):
        """``mass``: `BINS` probabilities that add up to 1. `from_mass` takes any weights."""
        self._mass = mass
        # Added up from the end, where the shares are small: a difference to 1 would lose them.
        self._left = tuple(accumulate(reversed(mass)))[::-1]
        self._curve: _Curve | None = None
        self._packed: bytes | None = None

    @classmethod
    def from_mass(cls, mass: Sequence[float]) -> Forecast:
        """A forecast of `BINS` weights on any scale. Raises ValueError if there are more or fewer, if one is negative
        or not finite, or if all are zero."""
        total = math.fsum(mass)
        if len(mass) != BINS or min(mass) < 0 or not math.isfinite(total) or total <= 0:
            raise ValueError(f"a forecast needs {BINS} weights that are finite, not negative and not all zero")
        return cls(tuple([weight / total for weight in mass]))

    @classmethod
    def exactly(cls, seconds: float, sigma: float = 0.2) -> Forecast:
        """A wait of about ``seconds``: log-normal, with this median. Infinite ``seconds`` are never. Raises ValueError
        for seconds that are negative, and for a ``sigma`` that is not positive and finite."""
        if not seconds >= 0 or not 0 < sigma < math.inf:
            raise ValueError(f"cannot forecast a wait of {seconds} s with a sigma of {sigma}")
        if not SHORTEST_S < seconds <= EDGES[-1]:
            return cls(tuple(float(at == bin_of(seconds)) for at in range(BINS)))
        below = [0.0, *(_NORMAL.cdf(math.log(edge / seconds) / sigma) for edge in EDGES[1:]), 1.0]
        return cls.from_mass([upper - lower for lower, upper in zip(below, below[1:], strict=False)])

    @classmethod
    def after_all(cls, forecasts: Iterable[Forecast]) -> Forecast:
        """A wait that ends when all of these have, which begin together and know nothing of each other. Raises
        ValueError if there are none."""
        below: list[float] | None = None
        for forecast in forecasts:
            own = [1.0 - left for left in forecast._left[1:]]
            below = own if below is None else [one * other for one, other in zip(below, own, strict=True)]
        if below is None:
            raise ValueError("nothing is waited for")
        below = [0.0, *below, 1.0]
        return cls.from_mass([max(0.0, upper - lower) for lower, upper in zip(below, below[1:], strict=False)])

    @property
    def mass(self) -> tuple[float, ...]:
        """The probability of each bin."""
        return self._mass

    def by(self, seconds: float) -> float:
        """The probability that the wait lasts ``seconds`` at most."""
        return 1.0 - self._lasting(seconds)

    def rest(self, waited_s: float, share: float) -> float:
        """How long a wait that has lasted ``waited_s`` goes on at most, with probability ``share`` (0 to 1); infinite
        if that includes never. If it has lasted longer than was possible, this is as without a forecast."""
        waited_s = max(0.0, waited_s)
        lasting = self._lasting(waited_s)
        if lasting < 1e-9:
            return (waited_s + BLIND_S) * (float((1 - share) ** (-1 / BLIND_SHAPE)) - 1) if share < 1 else math.inf
        wanted = lasting * (1 - share)
        if wanted < self._left[NEVER] - 1e-12 or waited_s >= EDGES[-1]:
            return math.inf
        at = min(bin_of(waited_s), NEVER - 1)
        while at < NEVER - 1 and self._left[at + 1] > wanted:
            at += 1
        within = (self._left[at] - wanted) / self._mass[at] if self._mass[at] else 0.0
        return max(0.0, EDGES[at] + min(1.0, within) * _WIDTHS[at] - waited_s)

    def rate(self, waited_s: float) -> float:
        """The greatest quotient, over all *t*, of the probability that the wait ends in the next *t* seconds and the
        expected part of them that is waited, given that it has lasted ``waited_s`` (0 or more). Positive, per second.

        One in a million waits is taken for one without a forecast, so that a wait which has outlasted its forecast is
        treated as if it had none.
        """
        curve = self._curve
        if curve is None:
            curve = self._curve = self._drawn()
        left, spent, until = curve
        if waited_s >= EDGES[-1]:
            doubted = _DOUBT * _blind_left(waited_s)
            return blind_rate(waited_s) * doubted / ((1 - _DOUBT) * self._left[NEVER] + doubted)
        at = bin_of(waited_s)
        share = (waited_s - EDGES[at]) / _WIDTHS[at]
        end = at + 1
        own_left = left[at] - share * (left[at] - left[end])
        # Within a bin the quotient to its end does not depend on how far the end is, which may be no distance at all.
        best = (left[at] - left[end]) / _WIDTHS[at] * 2 / (own_left + left[end])
        own_spent = spent[at] + share * _WIDTHS[at] * (left[at] + own_left) / 2
        while (further := until[end]) != end:
            quotient = (own_left - left[further]) / (spent[further] - own_spent)
            if quotient <= best:
                break
            best, end = quotient, further
        return best

    def score(self, seconds: float | None) -> float:
        """The logarithm of the probability of the bin that a wait fell in, None being never; at least ln 10⁻⁹."""
        return math.log(max(1e-9, self._mass[NEVER if seconds is None else bin_of(seconds)]))

    def pack(self) -> bytes:
        """`BINS` bytes, a bin each, relative to the likeliest one. What is less than a 130,000th of it is lost."""
        packed = self._packed
        if packed is None:
            largest = max(self._mass)
            packed = self._packed = bytes([round(_LEVELS * math.sqrt(weight / largest)) for weight in self._mass])
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> Forecast:
        """The forecast of `pack`. Raises ValueError if these bytes are none."""
        if len(packed) != BINS or not any(packed):
            raise ValueError(f"a packed forecast has {BINS} bytes that are not all zero")
        return cls.from_mass([level * level for level in packed])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Forecast) and self._mass == other._mass

    def __hash__(self) -> int:
        return hash(self._mass)

    def __repr__(self) -> str:
        quantiles = ", ".join(f"{self.rest(0.0, share):.3g} s" for share in (0.1, 0.5, 0.9))
        return f"<Forecast 10/50/90 %: {quantiles}; never: {self._mass[NEVER]:.1%}>"

    def _lasting(self, seconds: float) -> float:
        """The probability that the wait lasts longer than ``seconds``."""
        if seconds <= 0:
            return self._left[0]
        at = bin_of(seconds)
        if at == NEVER:
            return self._left[NEVER]
        return self._left[at] - self._mass[at] * (seconds - EDGES[at]) / _WIDTHS[at]

    def _drawn(self) -> _Curve:
        left = [(1 - _DOUBT) * own + _DOUBT * doubted for own, doubted in zip(self._left, _BLIND_LEFT, strict=True)]
        spent = [0.0]
        for at, width in enumerate(_WIDTHS):
            spent.append(spent[-1] + width * (left[at] + left[at + 1]) / 2)
        # The best place to give up is on the upper hull of the points (spent, 1 - left), seen from the edge itself.
        until = list(range(BINS))
        for at in range(NEVER - 1, -1, -1):
            best = at + 1
            while until[best] != best:
                further = until[best]
                if (left[best] - left[further]) * (spent[best] - spent[at]) < (left[at] - left[best]) * (
                    spent[further] - spent[best]
                ):
                    break
                best = further
            until[at] = best
        return _Curve(left, spent, until)


def _blind_left(waited_s: float) -> float:
    return float((1 + waited_s / BLIND_S) ** -BLIND_SHAPE)


_BLIND_LEFT = tuple(map(_blind_left, EDGES))
