"""Everything at once."""

from __future__ import annotations

import faulthandler
import mmap
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from agentstate.errors import PageStoreFull
from agentstate.pages import Geometry, PageStore, Quota, inventory, merge
from agentstate.pages.testing.pages import MARK, content, keys, read, reader_for, write

GEOMETRY = Geometry(layers=2, page_size=4, component_bytes=(600, 500))
CHAINS = [keys(*(f"{chain}.{page}" for page in range(12))) for chain in range(6)]
VERSIONS = 3
SECONDS = float(os.environ.get("THREADS_SECONDS", "4"))


def right(page: bytes, layer: int) -> list[list[bytes]]:
    """What a page may be: one of its versions, in all of its components."""
    return [[content(GEOMETRY, page, layer, c, version) for c in range(2)] for version in range(VERSIONS)]


RIGHT = {(page, layer): right(page, layer) for chain in CHAINS for page in chain for layer in range(GEOMETRY.layers)}


@pytest.mark.parametrize("extents", [None, 14], ids=["with room", "under pressure"])
def test_no_page_is_lost_or_wrong_whatever_threads_do_at_once(directory: Path, extents: int | None) -> None:
    one = PageStore(directory / "size", MARK, GEOMETRY).draft_bytes(4)
    quota = Quota(None if extents is None else extents * one)
    store = PageStore(directory / "rank0", MARK, GEOMETRY, quota)
    pinned, base = CHAINS[0][:4], set[bytes]()
    write(store, pinned)
    store.retain(pinned, time.monotonic() + 3600.0)
    for chain in CHAINS[1:3]:
        write(store, chain[:4])
        base.update(chain[:4])
    end, failures = time.monotonic() + SECONDS, list[BaseException]()
    done = {"written": 0, "read": 0, "merged": 0, "held": 0}
    over_quota: list[int] = []

    def publishing(chance: random.Random) -> None:
        chain = chance.choice(CHAINS)
        first = chance.randrange(0, 12, 4)
        try:
            write(store, chain[first : first + chance.randint(1, 4)], chance.randrange(VERSIONS))
        except PageStoreFull:
            assert extents is not None
        else:
            done["written"] += 1
        if extents is not None and store.stats.bytes > extents * one:
            over_quota.append(store.stats.bytes)

    def reading(chance: random.Random) -> None:
        reader = readers[threading.get_ident()]
        chain = chance.choice(CHAINS)
        found = chain[: store.prefix_length(chain)]
        try:
            pin = store.pin(found)
        except KeyError:
            assert extents is not None, "lost between the look-up and the hold"
            return
        with pin:
            done["held"] += 1
            time.sleep(chance.random() / 200)
            for (_, layer, page), components in read(reader, [pin]).items():
                assert components in RIGHT[found[page], layer]
                done["read"] += 1

    def merging(chance: random.Random) -> None:
        reader = readers[threading.get_ident()]
        chain = chance.choice(CHAINS)
        found = chain[: store.prefix_length(chain)]
        try:
            done["merged"] += merge(store, reader, found, mmap.mmap(-1, 1 << 16), chance.choice([4000, 9000]))
        except (KeyError, PageStoreFull):
            assert extents is not None

    def steering(chance: random.Random) -> None:
        with store.needing_only() if chance.random() < 0.3 else nullcontext():
            store.need(chance.choice(CHAINS))
        store.retain(pinned, time.monotonic() + 3600.0)
        if extents is not None:
            act = chance.choice([lambda: store.make_room(one), store.collect])
            with suppress(PageStoreFull):
                act()
        assert all(report.good or report.header is None for report in inventory.check(store.directory))
        time.sleep(0.005)

    readers = {}

    def thread(act: Callable[[random.Random], None], seed: int) -> None:
        reader = readers[threading.get_ident()] = reader_for(GEOMETRY)
        chance = random.Random(seed)
        try:
            # However busy the machine, everything is done at least once.
            while (time.monotonic() < end or not all(done.values())) and not failures:
                act(chance)
        except BaseException as error:
            failures.append(error)
        finally:
            reader.close()

    acts = [publishing, publishing, reading, reading, merging, steering]
    threads = [threading.Thread(target=thread, args=(act, seed), daemon=True) for seed, act in enumerate(acts)]
    for one_thread in threads:
        one_thread.start()
    for one_thread in threads:
        one_thread.join(240 + SECONDS)
        if one_thread.is_alive():
            faulthandler.dump_traceback()
            pytest.fail("threads wait for each other")
    if failures:
        raise failures[0]
    assert all(done.values()), done
    assert not over_quota

    found = {page for chain in CHAINS for page in chain if page in store}
    assert set(pinned) <= found
    if extents is None:
        assert base <= found and store.stats.pages_evicted == 0
    files = {path: path.stat().st_size for path in (store.directory / "extents").iterdir()}
    assert (store.stats.extents, store.stats.bytes, store.stats.pages) == (len(files), sum(files.values()), len(found))
    assert {store.pin([page]).segments[0].extent.path for page in found} == set(files)
    store.close()
    again = PageStore(directory / "rank0", MARK, GEOMETRY)
    assert {page for chain in CHAINS for page in chain if page in again} == found
    assert (again.stats.extents, again.stats.bytes) == (len(files), sum(files.values()))
    again.close()
