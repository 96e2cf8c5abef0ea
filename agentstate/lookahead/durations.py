"""How long the waits of one tenant last, learned from those that have ended.

A wait is known by its tool and by the head of the command that the tool ran (`commands.head`), never by arguments or
contents. Each name has a histogram that fades by half in 500 of its waits. What a command has not shown yet it takes
from its tool, a tool from its tenant, and a tenant from published quantiles: each level counts as a few waits of the
one below.

What an agent announces is never believed as such. The *ratio* of the time that a wait took to the time that was
announced is learned in the same way, and a forecast comes from it only while that has forecast the latest waits better,
by the logarithm of the probability that it gave to what happened, than the names have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice, pairwise
from statistics import NormalDist
from typing import Any, NamedTuple

import msgpack

from agentstate.lookahead.forecast import BINS, EDGES, LONGEST_S, NEVER, SHORTEST_S, Forecast, bin_of

PERSON = ""
"""The tool of a wait for a person."""
OTHER = "\0other"
"""The tool of a wait of which nothing is known."""
MAX_NAMES = 512
MAX_NAME_CHARACTERS = 128
MAX_CHANGES = 20_000

_HALF_LIFE = 500
_TENANT_WEIGHT, _TOOL_WEIGHT, _COMMAND_WEIGHT = 4.0, 8.0, 4.0
_GROWTH = 2 ** (1 / _HALF_LIFE)
_LARGEST_WEIGHT = 2.0**40

# A ratio of 1 is kept in this bin, so that any from 2 ** -13 to 2 ** 13 has a bin of its own.
_EVEN = NEVER // 2


def _spread(kernel: tuple[float, ...]) -> list[list[tuple[int, float]]]:
    """The bins that a wait counts for, and how much, by its own bin: its neighbours as well, as a few waits do not tell
    one bin from the next. *Never* is alone."""
    half = len(kernel) // 2
    finite = [
        [(min(NEVER - 1, max(0, at + by - half)), share) for by, share in enumerate(kernel)] for at in range(NEVER)
    ]
    return [*finite, [(NEVER, 1.0)]]


_TIMES = _spread((1 / 9, 2 / 9, 3 / 9, 2 / 9, 1 / 9))
_OF_RATIOS = _spread((1 / 4, 2 / 4, 1 / 4))
_DOUBT = -0.3
_SCORE_MEMORY = 30.0


class _Histogram:
    """Weights of bins that fade as new ones come. Instead of making the old ones smaller, each new one is larger."""

    __slots__ = ("total", "unit", "weights")

    def __init__(self) -> None:
        self.weights: dict[int, float] = {}
        self.total = 0.0
        self.unit = 1.0

    def add(self, bins: list[tuple[int, float]]) -> None:
        self.unit *= _GROWTH
        if self.unit > _LARGEST_WEIGHT:
            self.weights = {at: weight / self.unit for at, weight in self.weights.items() if weight > self.unit * 1e-6}
            self.total /= self.unit
            self.unit = 1.0
        unit, weights = self.unit, self.weights
        for near, share in bins:
            weights[near] = weights.get(near, 0.0) + share * unit
        self.total += unit

    def waits(self) -> float:
        """How many waits it stands for, the faded ones counting less."""
        return self.total / self.unit

    def one(self, at: int, before: float, weight: float) -> float:
        """The probability of a bin, if it is ``before`` without this histogram and that counts as ``weight`` waits."""
        weight *= self.unit
        return (self.weights.get(at, 0.0) + weight * before) / (self.total + weight)

    def all(self, before: list[float], weight: float) -> list[float]:
        """The probabilities of all bins, like `one`."""
        weight *= self.unit
        scale = 1 / (self.total + weight)
        mixed = [weight * scale * share for share in before]
        for at, own in self.weights.items():
            mixed[at] += own * scale
        return mixed

    def packed(self) -> list[Any]:
        shown = {at: round(weight / self.unit, 4) for at, weight in self.weights.items()}
        return [{at: weight for at, weight in shown.items() if weight}]

    @classmethod
    def unpacked(cls, packed: list[Any]) -> _Histogram:
        histogram = cls()
        (weights,) = packed
        for at, weight in weights.items():
            if type(at) is not int or not 0 <= at < BINS or not 0 <= float(weight) <= _LARGEST_WEIGHT:
                raise ValueError(f"{at}: {weight} is no weight of a bin")
            histogram.weights[at] = float(weight)
        histogram.total = sum(histogram.weights.values())
        return histogram


class _Name:
    """What is known of the waits of a tenant, a tool or a command: the ``taken`` times, their ``ratios`` to announced
    ones, and by how much these forecast better (``lead``, a mean that fades, of ``scored`` waits at most)."""

    __slots__ = ("lead", "ratios", "scored", "taken")

    def __init__(self) -> None:
        self.taken = _Histogram()
        self.ratios: _Histogram | None = None
        self.lead = 0.0
        self.scored = 0.0

    def score(self, lead: float) -> None:
        self.scored = min(_SCORE_MEMORY, self.scored + 1)
        self.lead += (lead - self.lead) / self.scored

    def packed(self) -> list[Any]:
        ratios = self.ratios.packed() if self.ratios is not None else None
        return [self.taken.packed(), ratios, round(self.lead, 4), self.scored]

    @classmethod
    def unpacked(cls, packed: list[Any]) -> _Name:
        name = cls()
        taken, ratios, lead, scored = packed
        name.taken = _Histogram.unpacked(taken)
        name.ratios = _Histogram.unpacked(ratios) if ratios is not None else None
        name.lead, name.scored = float(lead), float(scored)
        if not math.isfinite(name.lead) or not 0 <= name.scored <= _SCORE_MEMORY:
            raise ValueError("a score is out of range")
        return name


class _Change(NamedTuple):
    tool: str
    head: str
    at: int
    announced: int | None


class Durations:
    """Forecasts for one tenant's waits. At most `MAX_NAMES` names of `MAX_NAME_CHARACTERS` characters are kept; a new
    one replaces the rarest of those that were not seen for long. Not thread-safe.

    If several processes learn for a tenant, SQL keeps what all of them learned. A process takes its `changes`, adds
    them to what is kept (`load` it in an empty `Durations`, `merge` the changes, `dump`), and loads the result in its
    own. What it has learned meanwhile stays and is in the next changes. So are changes that no load followed, because
    their transaction failed.
    """

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], _Name] = {}
        self._all: dict[str, _Name] = {}
        self._taken: list[_Change] = []
        self._new: list[_Change] = []

    def observe(
        self, tool: str, head: str, seconds: float | None, announced_s: float | None = None
    ) -> tuple[float, float] | None:
        """Learn that a wait took ``seconds``, or that its session never came back (None). A time that is negative or no
        number teaches nothing. An announcement that is not positive and finite counts as none.

        Of a wait that was announced, returns the logarithms of the probabilities that the announcement and, without it,
        the names gave to what happened; at least ln 10⁻⁹."""
        if seconds is not None and not seconds >= 0:
            return None
        at = NEVER if seconds is None else bin_of(seconds)
        change = _Change(_cut(tool), _cut(head), at, _announced(announced_s))
        scores = self._learn(change)
        self._new.append(change)
        if len(self._new) > MAX_CHANGES:
            del self._new[: MAX_CHANGES // 2]
        return scores

    def forecast(self, tool: str, head: str, announced_s: float | None = None) -> Forecast:
        """How long a wait lasts that has just begun."""
        names = self._known(_cut(tool), _cut(head))
        announced = _announced(announced_s)
        if announced is not None and _lead(names) > 0:
            mass = list(_RATIOS)
            for name, weight in names:
                if name.ratios is not None:
                    mass = name.ratios.all(mass, weight)
            return Forecast.from_mass(_shifted(mass, announced - _EVEN))
        mass = list(_before(tool))
        for name, weight in names:
            mass = name.taken.all(mass, weight)
        return Forecast.from_mass(mass)

    def lead(self, tool: str, head: str) -> float:
        """How much better announcements forecast such waits than their names do: a difference of logarithms of
        probabilities, on average. Announcements are used while it is positive."""
        return _lead(self._known(_cut(tool), _cut(head)))

    def changes(self) -> bytes | None:
        """What was learned since the last `load`, to `merge` elsewhere; None if that is nothing."""
        self._taken += self._new
        self._new = []
        del self._taken[:-MAX_CHANGES]
        return _pack([list(change) for change in self._taken]) if self._taken else None

    def merge(self, changes: bytes) -> None:
        """Learn the `changes` of another. Raises ValueError, having learned nothing, if these bytes are none."""
        try:
            merged = [_checked(*change) for change in _unpack(changes)]
        except (TypeError, ValueError) as error:
            raise ValueError(f"these are no changes of durations: {error}") from error
        for change in merged:
            self._learn(change)

    def dump(self) -> bytes:
        """All that is known, to `load`."""
        names = [[tool, head, name.packed()] for (tool, head), name in self._names.items()]
        return _pack([1, names, {kind: name.packed() for kind, name in self._all.items()}])

    def load(self, dumped: bytes) -> None:
        """Know what was dumped, and what was learned here since `changes` were last taken. Raises ValueError, and
        changes nothing, if these bytes are no dump."""
        try:
            version, names, kinds = _unpack(dumped)
            if version != 1:
                raise ValueError(f"version {version}")
            loaded = {(_text(tool), _text(head)): _Name.unpacked(name) for tool, head, name in names[-MAX_NAMES:]}
            tenant = {kind: _Name.unpacked(name) for kind, name in kinds.items() if kind in (PERSON, OTHER, _TOOLS)}
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"this is no dump of durations: {error}") from error
        self._names, self._all, self._taken = loaded, tenant, []
        for change in self._new:
            self._learn(change)

    def _learn(self, change: _Change) -> tuple[float, float] | None:
        tool, head, at, announced = change
        names, scores = self._kept(tool, head), None
        if announced is not None:
            ratio = NEVER if at == NEVER else min(NEVER - 1, max(0, at - announced + _EVEN))
            by_name, by_ratio = _before(tool)[at], _RATIOS[ratio]
            for name, weight in names:
                by_name = name.taken.one(at, by_name, weight)
                if name.ratios is None:
                    name.ratios = _Histogram()
                by_ratio = name.ratios.one(ratio, by_ratio, weight)
                name.ratios.add(_OF_RATIOS[ratio])
            scores = math.log(max(1e-9, by_ratio)), math.log(max(1e-9, by_name))
            lead = max(-5.0, min(5.0, scores[0] - scores[1]))
            for name, _ in names:
                name.score(lead)
        for name, _ in names:
            name.taken.add(_TIMES[at])
        return scores

    def _known(self, tool: str, head: str) -> list[tuple[_Name, float]]:
        """What is known of a wait, from the general to the particular, and what each counts for the next."""
        found = [(self._all.get(_kind(tool)), _TENANT_WEIGHT)]
        if tool not in (PERSON, OTHER):
            found.append((self._names.get((tool, "")), _TOOL_WEIGHT))
            if head:
                found.append((self._names.get((tool, head)), _COMMAND_WEIGHT))
        return [(name, weight) for name, weight in found if name is not None]

    def _kept(self, tool: str, head: str) -> list[tuple[_Name, float]]:
        """The same, with a name for all that has none yet."""
        kind = _kind(tool)
        if kind not in self._all:
            self._all[kind] = _Name()
        kept = [(self._all[kind], _TENANT_WEIGHT)]
        if tool not in (PERSON, OTHER):
            kept.append((self._name(tool, ""), _TOOL_WEIGHT))
            if head:
                kept.append((self._name(tool, head), _COMMAND_WEIGHT))
        return kept

    def _name(self, tool: str, head: str) -> _Name:
        key = tool, head
        name = self._names.pop(key, None)
        if name is None:
            name = _Name()
            if len(self._names) >= MAX_NAMES:
                # Not simply the oldest: a flood of new names must not displace what is used.
                oldest = islice(self._names, 16)
                del self._names[min(oldest, key=lambda known: self._names[known].taken.waits())]
        self._names[key] = name
        return name


_TOOLS = "tools"


def _kind(tool: str) -> str:
    return tool if tool in (PERSON, OTHER) else _TOOLS


def _lead(names: Iterable[tuple[_Name, float]]) -> float:
    lead = _DOUBT
    for name, weight in names:
        lead = (name.lead * name.scored + lead * weight) / (name.scored + weight)
    return lead


def _announced(seconds: float | None) -> int | None:
    """The bin of an announcement; None if it says nothing."""
    if seconds is None or not 0 < seconds < math.inf:
        return None
    return bin_of(min(LONGEST_S, max(SHORTEST_S, seconds)))


def _cut(name: str) -> str:
    """A name as it is kept: bounded, and nothing that UTF-8 cannot hold."""
    name = name[:MAX_NAME_CHARACTERS]
    return name if name.isascii() else name.encode(errors="replace").decode()


def _shifted(mass: list[float], by: int) -> list[float]:
    """Bins moved ``by`` places. What leaves the grid stays at its ends; *never* stays where it is."""
    moved = [0.0] * BINS
    moved[NEVER] = mass[NEVER]
    for at, weight in enumerate(mass[:NEVER]):
        moved[min(NEVER - 1, max(0, at + by))] += weight
    return moved


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


def _unpack(packed: bytes) -> Any:
    try:
        return msgpack.unpackb(packed, strict_map_key=False)
    except Exception as error:  # msgpack raises errors of several unrelated classes
        raise ValueError(str(error) or type(error).__name__) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no name")
    return _cut(value)


def _checked(tool: Any, head: Any, at: Any, announced: Any) -> _Change:
    if type(at) is not int or not 0 <= at < BINS:
        raise ValueError(f"{at!r} is no bin")
    if announced is not None and (type(announced) is not int or not 0 <= announced < NEVER):
        raise ValueError(f"{announced!r} is no bin that can be announced")
    return _Change(_text(tool), _text(head), at, announced)


def _published(points: Iterable[tuple[float, float]], never: float) -> list[float]:
    """The mass of a distribution with these quantiles (share below, seconds): log-normal between each two, the outer
    pieces extended. The share of waits that never end was not published."""
    normal = NormalDist()
    known = [(math.log(seconds), normal.inv_cdf(share)) for share, seconds in points]

    def below(seconds: float) -> float:
        at = math.log(seconds)
        (x0, z0), (x1, z1) = next((pair for pair in pairwise(known) if at <= pair[1][0]), (known[-2], known[-1]))
        return normal.cdf(z0 + (z1 - z0) * (at - x0) / (x1 - x0))

    shares = [0.0, *(below(edge) for edge in EDGES[1:])]
    finite = [upper - lower for lower, upper in pairwise(shares)]
    return [(1 - never) * share / shares[-1] for share in finite] + [never]


# Tool calls and people of 4,265 conversations of coding agents (TraceLab).
_OF_TOOLS = _published([(0.5, 0.3), (0.9, 13.6), (0.99, 216.0)], never=0.005)
_OF_PEOPLE = _published([(0.5, 86.0), (0.9, 21 * 60.0), (0.99, 14 * 3600.0)], never=0.15)
_OF_OTHERS = [(one + other) / 2 for one, other in zip(_OF_TOOLS, _OF_PEOPLE, strict=True)]
_RATIOS = _shifted(list(Forecast.exactly(EDGES[_EVEN + 1], sigma=0.7).mass), 0)


def _before(tool: str) -> list[float]:
    """What is believed of a kind of wait before any was seen."""
    return {PERSON: _OF_PEOPLE, OTHER: _OF_OTHERS}.get(tool, _OF_TOOLS)
