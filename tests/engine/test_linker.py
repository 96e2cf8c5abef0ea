"""What the linker says of sessions, and the order in which it ends, with stand-ins for what it asks."""

from __future__ import annotations

import threading
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from contents import keys

from agentstate.manifests import Manifest
from engine_patch.device_tier import Progress
from engine_patch.ledger import Ledger
from engine_patch.linker import AgentStateLinker
from engine_patch.sglang_api import RadixKey

PAGE_SIZE = 4


class Pools:
    """Stores that hold the first ``stored`` pages of whatever they are asked for."""

    def __init__(self, stored: int, log: list[str]):
        self.held = stored
        self.share: float | None = None
        self._log = log

    def durable(self, keys: list[bytes], *, use: bool = False) -> int:
        return min(self.held, len(keys))

    def n_bytes(self, pages: int) -> int:
        return 100 * pages

    def prefetch(self, session_id: str, keys: list[bytes], ttl_s: float) -> Any:
        return lambda: self.share

    def finish_spilling(self, within_s: float) -> None:
        self._log.append("everything is stored")

    def close(self) -> None:
        self._log.append("the stores are closed")


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def linker(log: list[str]) -> AgentStateLinker:
    linker = AgentStateLinker.__new__(AgentStateLinker)
    linker.page_size, linker._off, linker.device_tier, linker._prefetch_ttl_s = PAGE_SIZE, None, None, 60
    linker._unsettled, linker._settling = {}, threading.Lock()
    linker._pools = Pools(8, log)
    linker._ledger = Ledger(PAGE_SIZE, linker._pools.n_bytes, linker._pools.durable)
    linker._catalog = SimpleNamespace(load=lambda session: None, close=lambda: log.append("manifests are written"))
    linker._control = SimpleNamespace(close=lambda: log.append("nobody asks any more"))
    return linker


def manifest(pages: int, lost: int) -> Manifest:
    packed = b"".join(keys(*range(pages)))
    tokens = pages * PAGE_SIZE
    return Manifest("s", "f", 0, "n", "e", PAGE_SIZE, tokens, packed, 100 * pages, lost * PAGE_SIZE)


@pytest.mark.parametrize(
    ("lost", "stored", "state"), [(0, 8, "durable"), (3, 8, "partial"), (0, 4, "partial"), (0, 0, "lost")]
)
def test_a_flush_of_a_session_of_another_life_knows_what_that_had_lost(
    linker: AgentStateLinker, lost: int, stored: int, state: str
) -> None:
    linker._catalog.load = lambda session: manifest(6, lost)
    linker._pools.held = stored
    answer = linker._standing("s")
    assert (answer["state"], answer["pages"]) == (state, min(6, stored))


def test_an_engine_that_does_not_store_any_more_does_not_speak_for_newer_requests(linker: AgentStateLinker) -> None:
    linker._ledger.settled("s", linker._ledger.finished("s"), keys(1, 2), 2)
    linker._ledger.saved(Manifest("s", "f", 0, "n", "e", PAGE_SIZE, 2 * PAGE_SIZE, b"".join(keys(1, 2)), 200))
    linker._catalog.load = lambda session: manifest(2, 0)
    linker.retire("its weights have changed")
    assert linker._standing("s")["state"] == "durable"
    linker.request_finished("s", None)
    assert linker._standing("s") == {"state": "unknown", "tokens": 0, "pages": 0, "bytes": 0}


@pytest.mark.parametrize(
    ("share", "state", "pages"), [(None, "pending", 8), (1, "warm", 8), (0.6, "partial", 4), (0.0, "cold", 0)]
)
def test_a_prefetch_is_warm_when_all_of_it_is_in_memory(
    linker: AgentStateLinker, share: float | None, state: str, pages: int
) -> None:
    linker._pools.share = share
    answer = linker._prefetch("s", "host", b"".join(keys(*range(8))))()
    assert (answer["state"], answer["pages"], answer["bytes"], answer["tier"]) == (state, pages, 100 * pages, "host")


def test_what_the_device_cannot_take_goes_to_host_memory(linker: AgentStateLinker) -> None:
    linker._pools.share = 1
    packed = b"".join(keys(*range(8)))
    linker.device_tier = SimpleNamespace(prefetch=lambda session, chain: None)
    assert linker._prefetch("s", "device", packed)()["tier"] == "host"
    linker.device_tier = SimpleNamespace(prefetch=lambda session, chain: lambda: Progress.DONE)
    assert linker._prefetch("s", "device", packed)()["tier"] == "device"


def test_what_waits_for_the_drive_is_one_request_a_session(linker: AgentStateLinker) -> None:
    queued: list[Any] = []
    saved: list[str] = []
    pools: Any = linker._pools
    pools.then, pools.need, pools.merge = queued.append, lambda chains: None, lambda chain: None
    linker._catalog.save = lambda manifest: saved.append(manifest.session_id)
    linker._manifest = lambda session_id, chain, durable: SimpleNamespace(session_id=session_id)
    key = RadixKey(array("q", range(2 * PAGE_SIZE)), None)
    for session_id in ("a", "b", "a", "a"):
        linker.request_finished(session_id, key)
    assert len(linker._unsettled) == 2
    for settle in queued:
        settle()
    assert saved == ["b", "a"]
    assert not linker._unsettled


def test_manifests_are_written_while_the_stores_can_be_asked(linker: AgentStateLinker, log: list[str]) -> None:
    """A closed store holds nothing: a manifest that was cut to that would lose what is on the disk."""
    linker.close()
    assert log == ["nobody asks any more", "everything is stored", "manifests are written", "the stores are closed"]
