"""Merging the small extents of a chain: every turn of an agent leaves one, and a disk reads a few large ranges much
faster than many small ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from agentstate.pages.extent import Memory
from agentstate.pages.pins import Segment
from agentstate.pages.reading import RANGE_BYTES, LayerwiseReader
from agentstate.pages.store import PageStore

# Extents that together stay below that are merged all the same when they are this many.
MANY = 8


def merge(
    store: PageStore,
    reader: LayerwiseReader,
    keys: Sequence[bytes],
    buffer: Memory,
    range_bytes: int = RANGE_BYTES,
    most_runs: int | None = None,
) -> int:
    """Rewrite runs of small extents along the chain ``keys``, at most ``most_runs`` of them, as one extent each: how
    many extents were replaced.

    An extent is small when a layer of it has less than ``range_bytes``. A run is rewritten once it makes an extent
    that is not small, or has 8 members, so a page is rewritten a few times at most. The extents of a run have one
    owner. ``buffer`` bounds an extent's size. Every page is verified before it is written again; a run with a wrong
    page, which is dropped, or one that the disk did not give back this time, which is not, stays as it is. Readers of
    the old extents are not disturbed.
    Raises KeyError when the chain is not stored (any more), also where that turns out in the middle, PageStoreFull and
    OSError.
    """
    with store.pin(keys) as pin:
        runs = list(islice(_runs(store, pin.segments, len(buffer), range_bytes), most_runs))
    return sum(len(run) for run in runs if _rewrite(store, reader, keys, run, buffer))


def _runs(store: PageStore, segments: list[Segment], most_bytes: int, range_bytes: int) -> Iterator[list[Segment]]:
    layer_bytes = store.geometry.layer_bytes
    run: list[Segment] = []
    pages = 0

    def complete() -> bool:
        return len(run) > 1 and (pages * layer_bytes >= range_bytes or len(run) >= MANY)

    for segment in segments:
        # Part of an extent is another chain's too, or has been dropped: copying it would leave the rest as waste.
        small = segment.pages == segment.extent.layout.pages and segment.pages * layer_bytes < range_bytes
        # No extent mixes owners, and who wrote a page first is charged for it.
        owner = segment.extent.owner
        others = bool(run) and run[-1].extent.owner != owner
        if complete() or not small or others or store.draft_bytes(pages + segment.pages, owner) > most_bytes:
            if complete():
                yield run
            run, pages = [], 0
        if small:
            run.append(segment)
            pages += segment.pages
    if complete():
        yield run


def _rewrite(
    store: PageStore, reader: LayerwiseReader, keys: Sequence[bytes], run: list[Segment], buffer: Memory
) -> bool:
    chain = list(keys[run[0].first : run[-1].first + run[-1].pages])
    draft, wrong, unread = store.draft(chain, buffer, run[0].extent.owner), set[int](), False
    pin = store.pin(chain)
    with reader.open(pin) as stream:
        for chunk in stream:
            wrong.update(chunk.wrong)
            unread |= bool(chunk.unread)
            for segment, arrays in chunk.parts:
                for component, rows in enumerate(arrays):
                    draft.component(chunk.layer, component)[segment.first : segment.first + segment.pages] = rows
        usable = not wrong and not unread
        if usable:
            store.publish(draft, again=True)
    store.drop(pin.copies(wrong))
    return usable
