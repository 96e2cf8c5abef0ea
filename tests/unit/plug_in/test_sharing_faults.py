"""Random histories of nodes that share a store, with a fault at every other call to the store and to SQL.

``AGENTSTATE_FAULTS=100000`` injects so many in each history, and prints what they were.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import places
import pytest
import sqlalchemy as sa
from contents import content
from nodes import PAGE_SIZE, PATIENT, URL, WINDOW, Node, Switched, age
from sqlalchemy.engine import Connection
from tools import in_memory

from agentstate.errors import DatabaseError, DatabaseUnreachable, TierMissing, TierRefused, TierShort, TierUnavailable
from agentstate.fleet import erasures, manifests
from agentstate.fleet.manifests import split_keys
from agentstate.pages import LayerwiseReader, Quota
from agentstate.sql import models
from agentstate.sql.database import Database
from agentstate.tiers import Guard, Page, Range, Reading, Tier
from agentstate.tiers.interface import settle
from agentstate.tiers.pages import SharedPages
from agentstate.tiers.testing.conformance import PATIENCE_S, names
from agentstate.tiers.testing.conformance import read as read_bytes
from engine_patch.sharing import Sharing, deletions

FAULTS = int(os.environ.get("AGENTSTATE_FAULTS", "300"))
# The first publishes what it is asked for, the second everything, and the third what it is about to evict.
NODES = ("a", "b", "c")
SESSIONS = 6
OF_WRITES = ("down", "refused", "answer lost", "death before", "death after")
OF_READS = ("down", "refused", "missing", "short", "wrong bytes", "swapped")
OF_LISTS = ("down", "part of it", "death before")
OF_TRANSACTIONS = ("down", "answer lost", "death before", "death after")


class Death(BaseException):
    """Of a node: nothing catches it."""


class Faults:
    """What goes wrong, one call in so many, while they are ``on``."""

    def __init__(self, chance: random.Random):
        self.chance = chance
        self.on = False
        self.often = 0.0
        self.injected = Counter[str]()

    def draw(self, what: str, kinds: Sequence[str]) -> str | None:
        if not self.on or self.chance.random() >= self.often * (0.3 if what == "SQL" else 1.0):
            return None
        kind = self.chance.choice(kinds)
        self.injected[f"{what}: {kind}"] += 1
        return kind


class FaultyTier(Tier):
    def __init__(self, tier: Tier, faults: Faults):
        self._tier, self._faults = tier, faults

    def _changed(self, what: str, send: Callable[[], Future[Any]]) -> Future[Any]:
        kind = self._faults.draw(what, OF_WRITES)
        if kind == "death before":
            raise Death
        if kind in ("down", "refused"):
            return _failed(Future(), TierUnavailable("down") if kind == "down" else TierRefused("full"))
        future = send()
        if kind is not None:
            future.exception(PATIENCE_S)
            if kind == "death after":
                raise Death
            return _failed(Future(), TierUnavailable("no answer"))
        return future

    def mark(self, proposed: str | None = None) -> Future[str | None]:
        return self._changed("mark", lambda: self._tier.mark(proposed))

    def publish(self, name: str, file: BinaryIO, trailer: bytes = b"") -> Future[bool]:
        return self._changed("publish", lambda: self._tier.publish(name, file, trailer))

    def drop(self, name: str) -> Future[None]:
        return self._changed("drop", lambda: self._tier.drop(name))

    def sweep(self, older_than_s: float) -> Future[int]:
        return self._changed("sweep", lambda: self._tier.sweep(older_than_s))

    def read(self, name: str, ranges: Sequence[Range]) -> Reading:
        kind = self._faults.draw("read", OF_READS)
        errors = {"down": TierUnavailable("down"), "refused": TierRefused("no"), "missing": TierMissing("404")}
        errors["short"] = TierShort("cut")
        if kind in errors:
            return _failed(Reading(), errors[kind])
        if kind == "swapped":
            others = [other for other in names(self._tier) if other != name]
            return self._tier.read(self._faults.chance.choice(others or [name]), ranges)
        reading = self._tier.read(name, ranges)
        if kind == "wrong bytes" and reading.exception(PATIENCE_S) is None:
            into = self._faults.chance.choice(ranges).into
            into[self._faults.chance.randrange(len(into))] ^= 1 << self._faults.chance.randrange(8)
        return reading

    def list(self, prefix: str = "", after: str | None = None, limit: int = 1000) -> Future[Page]:
        kind = self._faults.draw("list", OF_LISTS)
        if kind == "death before":
            raise Death
        if kind == "down":
            return _failed(Future(), TierUnavailable("down"))
        future = self._tier.list(prefix, after, limit)
        if kind is None:
            return future
        page, part = future.result(PATIENCE_S), Future[Page]()
        part.set_result(Page([entry for entry in page.entries if self._faults.chance.random() < 0.5], page.after))
        return part

    def close(self) -> None:
        self._tier.close()


def _failed(future: Any, error: Exception) -> Any:
    settle(future, None, error)
    return future


class FaultyDatabase(Switched):
    def __init__(self, url: str, faults: Faults):
        super().__init__(url)
        self._faults = faults

    @contextmanager
    def read(self) -> Iterator[Connection]:
        if self._faults.draw("SQL", ("down",)):
            raise DatabaseUnreachable("of this test")
        with super().read() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        kind = self._faults.draw("SQL", OF_TRANSACTIONS)
        if kind == "death before":
            raise Death
        if kind == "down":
            raise DatabaseUnreachable("of this test")
        with super().write() as connection:
            yield connection
        if kind == "death after":
            raise Death
        if kind is not None:
            raise DatabaseUnreachable("of this test: it has committed")


class FaultyNode(Node):
    def __init__(self, world: World, name: str):
        self.world = world
        through, evict = name == "b", name == "c"
        super().__init__(name, world.directory / name, world.url, world.place, keep_s=1000.0)
        if evict:
            for store in self.stores.stores:
                store.quota = Quota(8 * store.draft_bytes(3))
        self.guard.close()
        self.database.close()
        # In their places: those that fail.
        self.database = FaultyDatabase(world.url, world.faults)
        self.guard = Guard(FaultyTier(world.place.open(), world.faults), "the share", PATIENT)
        self.extents.tier = self.guard
        self.sharing = Sharing(
            self.extents,
            URL,
            self.database,
            self.stores,
            lambda: self.engine,
            through=through,
            evict=evict,
            keep_s=1000.0,
            clock=lambda: world.now_s,
        )


class World:
    """``chains`` are the pages of the sessions that there are, by name. A page's name says all that is before it."""

    def __init__(self, url: str, place: places.Place, directory: Path, seed: int):
        self.url, self.place, self.directory = url, place, directory
        self.chance = random.Random(seed)
        self.faults = Faults(self.chance)
        self.now_s = 0.0
        self.sql = Database(url)
        self.tier = Guard(place.open(), "the share", PATIENT)
        self.nodes = {name: FaultyNode(self, name) for name in NODES}
        self.chains: dict[str, list[bytes]] = {}
        self.made = 0
        # What somebody else has done to an object is nobody's fault here.
        self.damaged: set[str] = set()
        self.restored, self.promised = 0, 0

    def close(self) -> None:
        self.faults.on = False
        for node in self.nodes.values():
            node.close()
        self.tier.close()
        self.sql.close()

    # What happens

    def step(self) -> None:
        actions = {self.serve: 4, self.round: 8, self.restore: 4, self.delete: 1, self.erase: 2, self.restart: 1}
        actions |= {self.pass_time: 2, self.damage: 0.3}
        (act,) = self.chance.choices(list(actions), list(actions.values()))
        # Some of what happens succeeds, or is interrupted late.
        self.faults.often = self.chance.choice((0.0, 0.03, 0.1, 0.3))
        self.faults.on = act in (self.round, self.restore, self.erase)
        name = self.chance.choice(NODES)
        try:
            act(name)  # type: ignore[operator]
        except DatabaseError:
            pass
        except Death:
            self.restart(name)
        finally:
            self.faults.on = False

    def serve(self, name: str) -> None:
        """A session's turn ends on a node, which has all of it then; and the node publishes it."""
        node = self.nodes[name]
        if len(self.chains) < SESSIONS:
            self.made += 1
            system = f"system {self.chance.randrange(2)}"
            self.chains[f"s{self.made}"] = [_key(system, page) for page in range(3)]
        session_id = self.chance.choice(list(self.chains))
        chain = self.chains[session_id]
        if self.chance.random() < 0.2:
            del chain[self.chance.randrange(1, len(chain) + 1) :]
            session_id_of_pages = f"{session_id} again {self.chance.random()}"
        else:
            session_id_of_pages = session_id
        first = len(chain)
        chain += [_key(f"{session_id_of_pages} {chain[-1].hex()}", page) for page in range(self.chance.randrange(4))]
        # A node may have spilled what was computed in one piece, or in several.
        node.stores.write(chain[: self.chance.randrange(1, len(chain) + 1)])
        node.stores.write(chain[:first] or chain)
        node.stores.write(chain)
        for store in node.stores.stores:
            store.need(chain, session_id)
        packed, tokens = b"".join(chain), PAGE_SIZE * len(chain)
        with self.sql.write() as connection:
            manifests.save(
                connection,
                manifests.Manifest(
                    session_id, node.engine.fingerprint, 0, name, node.engine.id, PAGE_SIZE, tokens, packed, 1
                ),
            )
        if name != "c" or self.chance.random() < 0.2:
            node.sharing.publish(session_id, list(chain))

    def round(self, name: str) -> None:
        self.nodes[name].sharing.round()

    def restore(self, name: str) -> None:
        """A session is resumed on a node: what comes from the shared store is right, or is not used."""
        if not self.chains:
            return
        chain = self.chance.choice(list(self.chains.values()))
        for shared, needed in zip(self.nodes[name].stores.shared, (chain, chain[-WINDOW:]), strict=True):
            self.restored += _restored(shared, needed[: shared.prefix_length(needed)])

    def delete(self, name: str) -> None:
        if self.chains:
            session_id = self.chance.choice(list(self.chains))
            del self.chains[session_id]
            with self.sql.write() as connection:
                manifests.erase(connection, [session_id])

    def erase(self, name: str) -> None:
        """What an `Eraser` does."""
        node = self.nodes[name]
        with node.database.read() as connection:
            found = erasures.waiting(connection, node.store, 100)
        for erasure in found:
            with node.database.read() as connection:
                needed = erasures.needed_pages(connection, node.store, erasure.chain)
            for store in node.stores.stores:
                store.erase(split_keys(erasure.chain.keys)[needed:])
            node.sharing.erase([erasure.chain])
            with node.database.write() as connection:
                erasures.done(connection, [erasure.id])

    def restart(self, name: str) -> None:
        """As after a crash: what only the process knew is lost."""
        self.nodes[name].close()
        self.nodes[name] = FaultyNode(self, name)

    def pass_time(self, name: str) -> None:
        seconds = self.chance.choice([1.0, 7.0, 700.0, 5000.0])
        self.now_s += seconds
        age(self.sql, seconds)

    def damage(self, name: str) -> None:
        """Somebody else changes an object, or deletes it."""
        there = names(self.tier)
        if not there:
            return
        one, other = self.chance.choice(there), self.chance.choice(there)
        self.damaged.add(one)
        how = self.chance.randrange(4)
        if how == 0:
            self.place.remove(one)
            return
        data = bytearray(self._object(other if how == 1 else one))
        if how == 2:
            del data[self.chance.randrange(len(data)) :]
        data[self.chance.randrange(len(data))] ^= 1 if data else 0
        self.place.put(one, bytes(data))

    def _object(self, name: str) -> bytes:
        page = self.tier.list(name.rpartition("/")[0]).result(PATIENCE_S)
        (n_bytes,) = [entry.n_bytes for entry in page.entries if entry.name == name]
        return read_bytes(self.tier, name, 0, n_bytes)

    # What must be

    def check(self) -> None:
        """Everything that SQL promises is there."""
        there = set(names(self.tier))
        by_mark: dict[str, set[bytes]] = {}
        columns = models.shared_extents.c
        with self.sql.read() as connection:
            for row in connection.execute(sa.select(models.shared_extents).where(columns.doomed_us.is_(None))):
                if row.name in there or row.name in self.damaged:
                    by_mark.setdefault(row.fingerprint, set()).update(split_keys(bytes(row._mapping["keys"])))
            promised = connection.execute(sa.select(models.manifests).where(models.manifests.c.shared_tokens > 0)).all()
        full, window = (store.fingerprint.hex() for store in self.nodes["a"].stores.stores)
        for row in promised:
            self.promised += 1
            pages = split_keys(bytes(row._mapping["keys"]))[: row.shared_tokens // PAGE_SIZE]
            for mark, needed in ((full, pages), (window, pages[-WINDOW:])):
                missing = [number for number, page in enumerate(needed) if page not in by_mark.get(mark, set())]
                assert not missing, f"{row.session_id} of {row.node} was promised to be shared: {missing} of {mark[:6]}"

    def settle(self, rounds: int = 4) -> None:
        """Nothing fails any more, and time passes."""
        for _ in range(rounds):
            for name in NODES:
                self.erase(name)
                self.round(name)
            self.check()
            self.now_s += 5000.0
            age(self.sql, 5000.0)


def _key(of: str, page: int) -> bytes:
    from contents import key

    return key(f"{of}: {page}")


def _restored(shared: SharedPages, pages: Sequence[bytes]) -> int:
    """How many pages can be used, of which all are right; what is wrong is dropped."""
    try:
        pin = shared.pin(pages)
    except KeyError:
        return 0
    geometry = shared.geometry
    reader = LayerwiseReader(geometry, staging_bytes=1 << 18, threads=1, chunk_bytes=1 << 16, open_extent=shared.open)
    bad, wrong = set[int](), set[int]()
    try:
        with reader.open(pin) as stream:
            for chunk in stream:
                bad |= chunk.unusable()
                wrong |= set(chunk.wrong)
                for segment, arrays in chunk.parts:
                    for slot in range(segment.pages):
                        page = segment.first + slot
                        for component, array in enumerate(arrays):
                            right = content(geometry, pages[page], chunk.layer, component)
                            assert page in bad or array[slot].tobytes() == right, "a wrong page was served"
    finally:
        reader.close()
    if wrong:
        shared.drop(pin.copies(wrong))
    return len(pages) - len(bad)


@pytest.fixture
def directory() -> Iterator[Path]:
    """On a drive that is fast to sync."""
    directory = Path(tempfile.mkdtemp(dir=in_memory()))
    yield directory
    shutil.rmtree(directory)


@pytest.mark.timeout(900 + FAULTS)
@pytest.mark.parametrize("kind", ["directory", "objects"])
def test_no_wrong_page_no_broken_promise_and_nothing_left(
    kind: str, directory: Path, migrated_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Objects are as young as they are.
    monkeypatch.setattr(deletions, "GRACE_S", -1.0)
    shutil.copy(migrated_file, directory / "agentstate.db")
    (directory / "share").mkdir()
    place = places.in_memory() if kind == "objects" else places.Directory(directory / "share")
    world = World(f"sqlite:///{directory / 'agentstate.db'}", place, directory, FAULTS)
    try:
        while world.faults.injected.total() < FAULTS:
            for _ in range(20):
                world.step()
            world.check()
        world.settle()
        there = set(names(world.tier))
        with world.sql.read() as connection:
            listed = set(connection.execute(sa.select(models.shared_extents.c.name)).scalars())
        assert there <= listed
        with suppress(DatabaseError):
            for session_id in list(world.chains):
                del world.chains[session_id]
                with world.sql.write() as connection:
                    manifests.erase(connection, [session_id])
        world.settle(6)
        print(kind, dict(world.faults.injected), world.restored, "pages restored", world.promised, "promises")
        assert world.restored and world.promised
        assert set(names(world.tier)) == set()
    finally:
        world.close()
