"""Which requests a read of many ranges becomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from agentstate.tiers.interface import Range


class Part(NamedTuple):
    """Bytes of one range: ``into`` gets them from ``offset`` of the object on."""

    offset: int
    into: memoryview


class Span(NamedTuple):
    """One request, of the bytes ``[start, end)`` of an object, and which parts of it go where."""

    start: int
    end: int
    parts: list[Part]


def spans(ranges: Sequence[Range], gap: int, most: int) -> list[Span]:
    """Read what lies at most ``gap`` bytes apart with one request, and at most ``most`` bytes with one.

    Ranges that are longer are cut. A gap is read and thrown away, so it should take no longer than another request.
    """
    pieces = [Part(offset + at, into[at : at + most]) for offset, into in ranges for at in range(0, len(into), most)]
    found: list[Span] = []
    for part in sorted(pieces, key=lambda part: part.offset):
        end = part.offset + len(part.into)
        if found:
            start, reached, parts = found[-1]
            if part.offset <= reached + gap and max(end, reached) - start <= most:
                parts.append(part)
                found[-1] = Span(start, max(end, reached), parts)
                continue
        found.append(Span(part.offset, end, [part]))
    return found
