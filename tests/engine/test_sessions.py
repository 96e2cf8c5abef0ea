"""What a rank says of its sessions, and the order in which it ends, with stand-ins for what it asks."""

from __future__ import annotations

import time
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from contents import keys
from turns import turn

from agentstate.errors import EngineError
from agentstate.fleet import turns
from agentstate.fleet.engines import Engine
from agentstate.fleet.manifests import Manifest
from agentstate.pages import Need, PageKeys, Urgency
from agentstate.settings import Settings
from agentstate.sql.database import Database
from engine_patch import sessions
from engine_patch.rank import Rank
from engine_patch.sessions import Progress, Sessions
from engine_patch.sglang_api import RadixKey
from engine_patch.sharing import Publication
from engine_patch.turns import RequestSession

PAGE_SIZE = 4


class Pools:
    """Stores that hold the first ``held`` pages of whatever they are asked for."""

    def __init__(self) -> None:
        self.held = 8
        self.fraction: float | None = None
        self.queued: list[Any] = []
        self.superseded: list[tuple[str, int]] = []
        self.shared = 0
        self.shared_known = True
        self.on_node = 8
        self.prefetched: list[tuple[float, Need]] = []

    def durable(self, keys: list[bytes], *, use: bool = False) -> int:
        return min(self.held, len(keys))

    def reachable(self, keys: list[bytes]) -> int:
        return self.durable(keys)

    def published(self, keys: list[bytes]) -> int:
        return min(self.shared, len(keys))

    def here(self, keys: list[bytes]) -> bool:
        return len(keys) <= self.on_node

    def held(self, keys: list[bytes]) -> list[bool]:
        return [False] * len(keys)

    def n_bytes(self, pages: int) -> int:
        return 100 * pages

    def extent_names(self, keys: list[bytes]) -> list[tuple[str | None, str | None]]:
        """Three pages an extent; none of the last one."""
        names: list[str | None] = [f"{number // 3}.ext" for number in range(len(keys) - 1)]
        return [(name, None) for name in [*names, None][: len(keys)]]

    def in_host_memory(self, keys: list[bytes]) -> list[bool]:
        return [number == 3 for number in range(len(keys))]

    def need(self, session_id: str, keys: list[bytes]) -> None:
        pass

    def need_only(self, chains: Any) -> None:
        list(chains)

    def take_losers(self) -> set[str]:
        return set()

    def reads(self) -> frozenset[str]:
        return frozenset()

    def merge(self, chain: list[bytes]) -> None:
        pass

    def supersede(self, keys: list[bytes], session_id: str) -> None:
        self.superseded.append((session_id, len(keys)))

    def then(self, action: Any) -> None:
        self.queued.append(action)

    def prefetch(self, session_id: str, keys: list[bytes], ttl_s: float, need: Need) -> Any:
        self.prefetched.append((ttl_s, need))
        return lambda: self.fraction


class Stage:
    """Sessions whose catalog is a stand-in that remembers what it was given."""

    def __init__(self, directory: Path, writer: int | None = None):
        self.off: str | None = None
        self.pools: Any = Pools()
        self.saved: list[str] = []
        self.abandoned: list[tuple[str, int]] = []
        engine = Engine("e", "n", 0, "", "", "m", "f", str(directory))
        self.sessions = Sessions(
            self.pools,
            engine,
            Database(f"sqlite:///{directory / 'agentstate.db'}"),
            Settings(home=directory),
            page_size=PAGE_SIZE,
            stores=lambda: self.off is None,
            dead=list,
            writer=writer,
        )
        self.sessions.close()
        self.catalog = SimpleNamespace(
            load=lambda session: None,
            save=lambda manifest: self.saved.append(manifest.session_id),
            abandon=lambda session, keys, first: self.abandoned.append((session, len(keys) - first)),
        )
        self.sessions._catalog = self.catalog  # type: ignore[assignment]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def manifest(pages: int, lost: int) -> Manifest:
    packed = b"".join(keys(*range(pages)))
    tokens = pages * PAGE_SIZE
    return Manifest("s", "f", 0, "n", "e", PAGE_SIZE, tokens, packed, 100 * pages, lost * PAGE_SIZE)


@pytest.mark.parametrize(
    ("lost", "stored", "state"), [(0, 8, "durable"), (3, 8, "partial"), (0, 4, "partial"), (0, 0, "lost")]
)
def test_a_flush_of_a_session_of_another_life_knows_what_that_had_lost(
    stage: Stage, lost: int, stored: int, state: str
) -> None:
    stage.catalog.load = lambda session: manifest(6, lost)
    stage.pools.held = stored
    answer = stage.sessions.standing("s")
    assert (answer["state"], answer["pages"]) == (state, min(6, stored))


def test_an_engine_that_does_not_store_any_more_does_not_speak_for_newer_requests(stage: Stage) -> None:
    ledger = stage.sessions._ledger
    ledger.settled("s", ledger.finished(turn()), keys(1, 2), 2)
    ledger.saved(Manifest("s", "f", 0, "n", "e", PAGE_SIZE, 2 * PAGE_SIZE, b"".join(keys(1, 2)), 200))
    stage.catalog.load = lambda session: manifest(2, 0)
    stage.off = "its weights have changed"
    assert stage.sessions.standing("s")["state"] == "durable"
    stage.sessions.finished(turn(), RadixKey(array("q"), None))
    assert stage.sessions.standing("s") == {
        **{"state": "unknown", "tokens": 0, "pages": 0, "bytes": 0},
        "epoch": 0,
    }


@pytest.mark.parametrize(
    ("fraction", "state", "pages"), [(None, "pending", 8), (1, "warm", 8), (0.6, "partial", 4), (0.0, "cold", 0)]
)
def test_a_prefetch_is_warm_when_all_of_it_is_in_memory(
    stage: Stage, fraction: float | None, state: str, pages: int
) -> None:
    stage.pools.fraction = fraction
    answer = stage.sessions.prefetch("s", "host", b"".join(keys(*range(8))))()
    assert (answer["state"], answer["pages"], answer["bytes"], answer["tier"]) == (state, pages, 100 * pages, "host")


def test_what_the_device_cannot_take_goes_to_host_memory(stage: Stage) -> None:
    stage.pools.fraction = 1
    packed = b"".join(keys(*range(8)))
    device: Any = SimpleNamespace(prefetch=lambda session, chain, need: None)
    stage.sessions.device = device
    assert stage.sessions.prefetch("s", "device", packed)()["tier"] == "host"
    device.prefetch = lambda session, chain, need: lambda: Progress.DONE
    assert stage.sessions.prefetch("s", "device", packed)()["tier"] == "device"


@pytest.mark.parametrize("tier", ["host", "device"])
@pytest.mark.parametrize(("due_s", "counts"), [(None, 0), (5.0, 5), (1e300, 600)])
def test_what_is_due_is_read_by_its_time_and_kept_until_then(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tier: str, due_s: float | None, counts: float
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    needs: list[Need] = []
    stage.sessions.device = SimpleNamespace(prefetch=lambda session, chain, need: needs.append(need))  # type: ignore[assignment]
    stage.sessions.prefetch("s", tier, b"".join(keys(1)), due_s)
    ((kept_s, need),) = stage.pools.prefetched
    assert need == Need(Urgency.DUE, 1000.0 + counts)
    assert needs == ([need] if tier == "device" else [])
    assert kept_s == counts + Settings().prefetch_ttl_s


def test_a_map_has_a_part_for_pages_that_are_in_the_same_places(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage.sessions, "_chain", lambda session_id: [bytes([page]) * 32 for page in range(6)])

    def parts(on_device: int) -> list[tuple[int, int, bool, bool, str | None]]:
        found = stage.sessions.page_map("s", on_device)
        assert all(part["shared_extent"] is None for part in found["page_map"]) and found["more_tokens"] == 0
        return [
            (part["first"] // PAGE_SIZE, part["tokens"] // PAGE_SIZE, part["device"], part["host"], part["extent"])
            for part in found["page_map"]
        ]

    stored = [(3, 1, False, True, "1.ext"), (4, 1, False, False, "1.ext"), (5, 1, False, False, None)]
    assert parts(0) == [(0, 3, False, False, "0.ext"), *stored]
    assert parts(2) == [(0, 2, True, False, "0.ext"), (2, 1, False, False, "0.ext"), *stored]
    assert parts(8)[-1] == (5, 3, True, False, None), "the device has tokens that are not stored yet"
    monkeypatch.setattr(sessions, "_PARTS", 2)
    found = stage.sessions.page_map("s", 0)
    assert (len(found["page_map"]), found["more_tokens"]) == (2, 2 * PAGE_SIZE)


def test_what_waits_for_the_drive_is_one_request_a_session(stage: Stage) -> None:
    key = RadixKey(array("q", range(2 * PAGE_SIZE)), None)
    for session_id in ("a", "b", "a", "a"):
        stage.sessions.finished(turn(session_id), key)
    assert len(stage.sessions._unsettled) == 2
    for settle in stage.pools.queued:
        settle()
    assert stage.saved == ["b", "a"]
    assert not stage.sessions._unsettled


@pytest.mark.parametrize("through", [True, False])
def test_what_is_stored_is_published_and_only_what_is_there_is_said_to_be(stage: Stage, through: bool) -> None:
    """Its manifest does not say so: somebody may have begun to delete it."""
    told: list[tuple[str, str, int]] = []
    stage.sessions._sharing = SimpleNamespace(  # type: ignore[assignment]
        publish=lambda session, keys: told.append(("publish", session, len(keys))),
        note=lambda session, keys: told.append(("note", session, len(keys))),
    )
    stage.sessions._shares_all = through
    saved: list[Manifest] = []
    stage.catalog.save = saved.append
    stage.pools.shared = 1
    stage.sessions.finished(turn("a"), RadixKey(array("q", range(2 * PAGE_SIZE)), None))
    for settle in stage.pools.queued:
        settle()
    assert [(one.tokens, one.shared_tokens) for one in saved] == [(2 * PAGE_SIZE, 0)]
    assert told == [("publish", "a", 2)] * through + [("note", "a", 1)]


@pytest.mark.parametrize(
    ("policy", "shared", "on_node", "published", "answers"),
    [
        ("suspend", False, 8, 0, [("durable", 0), ("durable", 8)]),
        ("suspend", True, 8, 0, [("pending", 0), ("durable", 8)]),
        # A node that has not all of it has no durable copy.
        ("suspend", False, 7, 7, [("pending", 0), ("durable", 8)]),
        ("evict", False, 8, 0, [("durable", None), ("durable", None)]),
        ("evict", True, 8, 0, [("pending", 0), ("durable", 8)]),
        ("evict", False, 8, 8, [("durable", 0), ("durable", 8)]),
        ("evict", False, 7, 7, [("pending", 0), ("durable", 8)]),
    ],
)
def test_where_a_session_is_durable_and_what_is_published_of_it(
    stage: Stage, policy: str, shared: bool, on_node: int, published: int, answers: list[tuple[str, int | None]]
) -> None:
    publications: list[Publication] = []

    def publish(session_id: str, chain: list[bytes]) -> Publication:
        publications.append(Publication(PageKeys.of(chain)))
        return publications[-1]

    stage.sessions._sharing = SimpleNamespace(  # type: ignore[assignment]
        publish=publish, refused=lambda publication: None
    )
    stage.sessions._shares_suspended = policy != "evict"
    stage.catalog.load = lambda session: manifest(8, 0)
    stage.pools.on_node, stage.pools.shared = on_node, published
    answer = stage.sessions.flush("s", shared=shared)
    before = answer()
    for publication in publications:
        publication.promised = len(publication.keys)
    after = answer()
    tokens = [(of["state"], of.get("shared_tokens")) for of in (before, after)]
    assert tokens == [(state, pages if pages is None else pages * PAGE_SIZE) for state, pages in answers]


def test_no_manifest_is_cut_before_it_is_known_what_the_shared_store_has(stage: Stage) -> None:
    stage.pools.held = 3
    stage.pools.shared_known = False
    assert stage.sessions._still_stored(keys(*range(8))) == 8
    stage.pools.shared_known = True
    assert stage.sessions._still_stored(keys(*range(8))) == 3


def test_a_rank_that_another_one_writes_for_says_what_it_sees_and_nothing_in_sql(tmp_path: Path) -> None:
    stage = Stage(tmp_path, writer=1)
    sessions = stage.sessions
    published: list[str] = []
    sessions._sharing = SimpleNamespace(  # type: ignore[assignment]
        publish=lambda session, keys: published.append(session), note=lambda session, keys: published.append(session)
    )
    sessions.finished(turn("a"), RadixKey(array("q", range(8 * PAGE_SIZE)), None))
    # The next turn begins anew.
    sessions.finished(turn("a", 2), RadixKey(array("q", range(9, 9 + 3 * PAGE_SIZE)), None))
    answer = sessions.flush("a", shared=True)
    assert answer()["state"] == "pending"
    for settle in stage.pools.queued:
        settle()
    assert answer() == {
        "state": "durable",
        "tokens": 3 * PAGE_SIZE,
        "pages": 3,
        "bytes": 300,
        "epoch": 2,
        "shared_tokens": 3 * PAGE_SIZE,
    }
    assert (stage.saved, stage.abandoned, published) == ([], [], [])
    assert sessions.erasures == {"waiting": 0, "done": 0}
    # Of a session of another life SQL has the manifest of the rank that writes.
    stage.catalog.load = lambda session: manifest(6, 0)
    assert sessions.standing("s")["state"] == "durable"


def test_what_a_turn_stores_that_was_taken_over_is_not_its_sessions_manifest_and_goes_with_it(stage: Stage) -> None:
    key = RadixKey(array("q", range(2 * PAGE_SIZE)), None)
    for epoch in (2, 1):
        stage.sessions.finished(turn("a", epoch), key)
    for settle in stage.pools.queued:
        settle()
    assert stage.saved == ["a"]
    # Of the newer one nothing but its manifest is to be remembered.
    assert stage.abandoned == [("a", 0), ("a", 2)]


def test_what_one_of_several_requests_at_once_stores_goes_with_the_session_too(stage: Stage) -> None:
    def key(*tokens: int, salt: str | None = None) -> RadixKey:
        return RadixKey(array("q", tokens), None, cache_salt=salt)

    first, longer, other = key(*range(4)), key(*range(8)), key(*range(4), 9, 9, 9, 9)
    for one in (first, longer, other, key(*range(4), salt="another")):
        stage.sessions.finished(turn("a"), one)
    for settle in stage.pools.queued:
        settle()
    assert stage.saved == ["a"]
    # The first is in the second; the next two are in none that came after them.
    assert stage.abandoned == [("a", 2), ("a", 2), ("a", 0)]


@pytest.mark.parametrize(("key", "remedy"), [(b"k" * 32, "as it is"), (None, "has not answered yet")])
def test_that_a_request_proves_no_turn_is_said_once(
    stage: Stage, caplog: pytest.LogCaptureFixture, key: bytes | None, remedy: str
) -> None:
    stage.catalog.signing_key = key
    right = turns.sign(b"k" * 32, turn("ses_1"))
    found = stage.sessions.turn(RequestSession(right))
    assert found == (turn("ses_1") if key else None)
    for sent in ("ses_1", "ses\n2", right.replace("ses_1", "ses_3")):
        assert stage.sessions.turn(RequestSession(sent)) is None
    (line,) = caplog.messages
    assert "proves no turn" in line and remedy in line and "\n" not in line


def test_manifests_are_written_while_the_stores_can_be_asked() -> None:
    """A closed store holds nothing: a manifest that was cut to that would lose what is on the disk."""
    log: list[str] = []
    rank: Any = Rank.__new__(Rank)
    rank._control = SimpleNamespace(close=lambda: log.append("nobody asks any more"))
    rank.pools = SimpleNamespace(
        finish_spilling=lambda within_s: log.append("everything is stored"),
        close=lambda: log.append("the stores are closed"),
    )
    rank.sessions = SimpleNamespace(
        stop_erasing=lambda: log.append("nothing is erased any more"),
        close=lambda: log.append("manifests are written"),
    )
    rank.sharing = SimpleNamespace(close=lambda: log.append("nothing is published any more"))
    rank._extents = SimpleNamespace(tier=SimpleNamespace(close=lambda: log.append("the shared store is closed")))
    rank.close()
    assert log == [
        "nobody asks any more",
        "nothing is erased any more",
        "everything is stored",
        "nothing is published any more",
        "manifests are written",
        "the shared store is closed",
        "the stores are closed",
    ]


def test_pages_of_a_turn_that_the_next_one_does_not_go_on_from_are_left(stage: Stage) -> None:
    def settle(epoch: int, *tokens: int) -> list[tuple[str, int]]:
        stage.sessions.finished(turn("a", epoch), RadixKey(array("q", tokens), None))
        stage.pools.superseded.clear()
        for action in stage.pools.queued:
            action()
        stage.pools.queued.clear()
        return list(stage.pools.superseded)

    first = range(4 * PAGE_SIZE)
    assert settle(1, *first) == []
    assert settle(2, *first, *range(PAGE_SIZE)) == []
    # A turn may ask beside its conversation; who knows which of its requests is gone on from.
    assert settle(2, 9, 9, 9, 9) == []
    assert settle(3, *first) == [("a", 1)]
    assert settle(4, *first[: 2 * PAGE_SIZE]) == [("a", 2)]
    assert settle(5, *first[: 2 * PAGE_SIZE], 9, 9, 9, 9) == []


@pytest.mark.parametrize("shared", [True, False])
def test_a_flush_to_the_shared_store_fails_where_nothing_more_is_published(stage: Stage, shared: bool) -> None:
    """Without that, it would wait until its time is over."""
    publication = Publication(PageKeys.of([bytes([n]) * 32 for n in range(3)]), promised=1)
    reasons: list[str | None] = [None, "a has its quota"]
    stage.sessions._sharing = SimpleNamespace(  # type: ignore[assignment]
        publish=lambda session, keys: publication, refused=lambda of: reasons[0] if of is publication else None
    )
    standing = {"state": "durable", "tokens": 3 * PAGE_SIZE, "pages": 3, "bytes": 300}
    stage.sessions.standing = lambda session: dict(standing)  # type: ignore[method-assign]
    stage.sessions._chain = lambda session: keys(1, 2, 3)  # type: ignore[method-assign]
    answer = stage.sessions.flush("s", shared=shared)
    assert answer() == {**standing, "state": "pending" if shared else "durable", "shared_tokens": PAGE_SIZE}
    del reasons[0]
    if shared:
        with pytest.raises(EngineError, match="has its quota"):
            answer()
        publication.promised = 3
    assert answer()["state"] == "durable"
