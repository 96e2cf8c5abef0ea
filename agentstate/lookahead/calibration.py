"""Whether forecasts come true: of waits that have ended, into which decile of its forecast each fell, and how likely
announcements and what was learned made what happened.

If forecasts are right, every decile has a tenth of the waits, and the 80 % interval between the 10 % and the 90 %
quantile has eight tenths. A *log loss* is the negative logarithm of the probability that a forecast gave to the bin
that a wait fell in: smaller is better, and where announcements are used, theirs should be the smaller one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from agentstate.lookahead.forecast import NEVER, Forecast, bin_of

DECILES = 10


def decile(forecast: Forecast, seconds: float | None, waited_s: float = 0.0) -> int:
    """The decile of a forecast, 0 to 9, that a wait of ``seconds`` fell into, of which ``waited_s`` had passed when it
    was forecast. None is a wait that never ended; this, and one of more than a day, count at the middle of what the
    forecast gives to them. Raises ValueError for a wait that is no number."""
    late = seconds is None or bin_of(seconds) == NEVER
    by = 1.0 - forecast.mass[NEVER] / 2 if seconds is None or late else forecast.by(seconds)
    before = forecast.by(waited_s)
    # A wait that had outlasted its forecast already is as late as can be.
    share = (by - before) / (1.0 - before) if before < 1.0 - 1e-9 else 1.0
    return min(DECILES - 1, max(0, int(share * DECILES)))


@dataclass
class Losses:
    """The log losses of announcements and of what was learned, for the same ``waits``."""

    announced: float = 0.0
    learned: float = 0.0
    waits: int = 0


@dataclass
class Calibration:
    """Sums by the kind of wait (``tool``, ``person``, ``other``). Not thread-safe, but may be read from any thread."""

    deciles: dict[str, list[int]] = field(default_factory=dict)
    losses: dict[str, Losses] = field(default_factory=dict)

    def ended(self, kind: str, forecast: Forecast, seconds: float | None, waited_s: float = 0.0) -> int:
        """A wait has ended for which this was forecast, once ``waited_s`` of it had passed; None: nobody came back.
        Returns its `decile`."""
        found = decile(forecast, seconds, waited_s)
        self.deciles.setdefault(kind, [0] * DECILES)[found] += 1
        return found

    def scored(self, kind: str, announced: float, learned: float) -> None:
        """A wait had been announced. These are the logarithms of the probabilities that the announcement, and the waits
        before it, gave to what happened."""
        losses = self.losses.setdefault(kind, Losses())
        losses.announced -= announced
        losses.learned -= learned
        losses.waits += 1

    def within(self, kind: str) -> float | None:
        """The share of waits that fell into their 80 % interval; None if there were none."""
        deciles = self.deciles.get(kind, [])
        return sum(deciles[1:-1]) / sum(deciles) if sum(deciles) else None
