"""What this rank writes to SQL: that it is alive, and the manifests of the sessions it has served; and what it reads
there: the key with which turns are signed, the quotas of accounts, and which sessions of this engine are pinned.

One thread does it, so the scheduler never waits for the database. While SQL is down nothing is lost as long as the
process lives: the newest manifest of every session waits here, and pages need no SQL.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

from sqlalchemy.engine import Connection

from agentstate.errors import DatabaseError
from agentstate.fleet import engines, manifests, pins, quotas, turns
from agentstate.fleet.engines import Engine
from agentstate.fleet.erasures import Chain, StoreName, head_of
from agentstate.fleet.manifests import Manifest
from agentstate.fleet.quotas import Quota
from agentstate.pages import ANYONE
from agentstate.sql import secret
from agentstate.sql.database import Database

logger = logging.getLogger(__name__)

_TELL_S = 600.0


class Catalog:
    """Registers ``engine`` and keeps it registered until `close`. ``saved`` is called, on the catalog's thread, with
    every manifest once it is committed, ``refused`` with those whose turn may publish none. ``needed`` is called, now
    and then, with the sessions of all live manifests and their chains, one by one: those of the engine's own node,
    since what another page directory keeps says nothing of this one's pages. ``losers`` are the sessions whose pages
    the stores may have lost since it was asked last: their manifests, all of them where `ANYONE` is among these, are
    cut to what is still ``stored`` of their chains, and what of the rest is ``held`` all the same is remembered, to be
    erased with the session; ``n_bytes`` is what so many pages take. At the start all of them are looked at. ``dead``
    are the stores that have been evicted as a whole, by the first digits of their fingerprints and their ranks: their
    manifests go. ``writer`` is the rank whose stores these are, if it is another than the engine's: that one writes the
    manifests, and this one only reads them. ``told`` is given the quotas of all accounts with every heartbeat, and the
    pins of the sessions whose newest turn was given to this engine: their tiers, and for how many seconds. ``reads``
    are the other nodes whose pages this rank can read now, which SQL is told."""

    def __init__(
        self,
        database: Database,
        engine: Engine,
        heartbeat_s: float,
        *,
        saved: Callable[[Manifest], None],
        refused: Callable[[Manifest], None],
        needed: Callable[[Iterable[tuple[str, list[bytes]]]], None],
        stored: Callable[[Sequence[bytes]], int],
        held: Callable[[Sequence[bytes]], list[bool]],
        losers: Callable[[], set[str]],
        dead: Callable[[], list[tuple[str, int]]],
        n_bytes: Callable[[int], int],
        told: Callable[[Mapping[str, Quota], Mapping[str, tuple[str, float]]], None] = lambda quotas, pins: None,
        reads: Callable[[], frozenset[str]] = frozenset,
        writer: int | None = None,
    ):
        self._told = told
        self._reads = reads
        self._rank = engine.rank if writer is None else writer
        self._speaks = self._rank == engine.rank
        self._database = database
        self._needed = needed
        self._stored = stored
        self._held = held
        self._losers = losers
        self._dead = dead
        self._n_bytes = n_bytes
        # Whose manifests are to be looked at, and the stores whose manifests go.
        self._suspects = {ANYONE}
        self._gone: list[tuple[str, int]] = []
        self._told_s = -math.inf
        self._engine = engine
        self._heartbeat_s = heartbeat_s
        self._saved = saved
        self._refused = refused
        # What turn tokens are signed with; None until the database has been reached.
        self.signing_key: bytes | None = None
        self._unsaved: dict[str, Manifest] = {}
        # What is being written, and what `watching` has told of since it began.
        self._being_written: list[Manifest] = []
        self._watched: list[Manifest] | None = None
        self._abandoned: list[tuple[str, Chain]] = []
        self._changed = threading.Condition()
        self._closing = self._closed = self._failing = False
        self._schema_checked = False
        self._thread = threading.Thread(target=self._run, name="agentstate-catalog", daemon=True)
        self._thread.start()

    def save(self, manifest: Manifest) -> None:
        """Queue a manifest; a newer one of the same session takes the place of one that still waits."""
        with self._changed:
            self._replace(self._unsaved, manifest)
            if self._watched is not None:
                self._watched.append(manifest)
            self._changed.notify()

    def _replace(self, waiting: dict[str, Manifest], manifest: Manifest) -> None:
        """What one lists that is never written is erased with its session, as what a manifest in SQL has listed."""
        before = waiting.get(manifest.session_id)
        if before is not None and not manifest.keys.startswith(before.keys):
            self._abandoned.append((before.session_id, Chain.whole(before.keys)))
        waiting[manifest.session_id] = manifest

    def abandon(self, session_id: str, keys: Sequence[bytes], first: int) -> None:
        """Queue what is stored of a session's chain of ``keys`` from page ``first`` on, which its manifest does not
        list."""
        if (beyond := self._beyond(keys, first)) is not None:
            with self._changed:
                self._abandoned.append((session_id, beyond))
                self._changed.notify()

    @contextmanager
    def watching(self) -> Iterator[list[Manifest]]:
        """The manifests that wait to be written, and those that are queued until the end, as they come. To be open once
        at a time."""
        with self._changed:
            watched = self._watched = [*self._being_written, *self._unsaved.values()]
        try:
            yield watched
        finally:
            with self._changed:
                self._watched = None

    @property
    def waiting(self) -> int:
        """Manifests that wait to be written, and what is beyond them."""
        return len(self._unsaved) + len(self._abandoned)

    def load(self, session_id: str) -> Manifest | None:
        """The manifest that SQL holds of a session for this engine's pages. Raises DatabaseError."""
        with self._database.read() as connection:
            return self._load(connection, session_id)

    def _load(self, connection: Connection, session_id: str) -> Manifest | None:
        engine = self._engine
        return manifests.load(connection, session_id, engine.fingerprint, self._rank, engine.node)

    def elsewhere(self, session_id: str) -> Manifest | None:
        """What other nodes have of a session that this rank can restore: those of its machine, or what any of them has
        published in the shared store, if this engine has one. Raises DatabaseError."""
        engine, reads = self._engine, self._reads()
        if not reads and not engine.shared_store:
            return None
        with self._database.read() as connection:
            return manifests.elsewhere(
                connection,
                session_id,
                engine.fingerprint,
                self._rank,
                engine.node,
                reads=reads,
                shared=bool(engine.shared_store),
            )

    def close(self) -> None:
        """Write what waits, if the database answers, and take the engine off the list."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _tell_needed(self) -> None:
        """Tell which chains live manifests need: sessions are deleted and expire in SQL, where nobody tells us."""
        if time.monotonic() - self._told_s < _TELL_S:
            return
        with self._changed:
            unsaved = list(self._unsaved.values())
        with self._database.read() as connection:
            saved = manifests.chains(connection, self._engine.fingerprint, self._engine.rank, self._engine.node)
            self._needed(chain(saved, ((manifest.session_id, manifest.page_keys()) for manifest in unsaved)))
        self._told_s = time.monotonic()

    def _cut(self) -> None:
        """Make manifests say what is still there."""
        self._suspects |= self._losers()
        if not self._suspects:
            return
        with self._changed:
            waiting = set(self._unsaved)
        engine = self._engine
        cut = []
        # They are looked at without keeping others from writing.
        with self._database.read() as connection:
            for manifest in (
                manifests.of_rank(connection, engine.fingerprint, engine.rank, engine.node)
                if ANYONE in self._suspects
                else filter(None, (self._load(connection, session_id) for session_id in self._suspects))
            ):
                keys = manifest.page_keys()
                # What is in the shared store is listed as long as the session is: nobody would need it otherwise.
                pages = max(self._stored(keys), manifest.shared_tokens // manifest.page_size)
                if pages < len(keys):
                    tokens = pages * manifest.page_size
                    lost_tokens = manifest.lost_tokens + manifest.tokens - tokens
                    kept, n_bytes = b"".join(keys[:pages]), self._n_bytes(pages)
                    short = replace(manifest, tokens=tokens, keys=kept, nbytes=n_bytes, lost_tokens=lost_tokens)
                    cut.append((manifest, short, self._beyond(keys, pages)))
        if cut:
            with self._database.write() as connection:
                for manifest, short, beyond in cut:
                    # A session that was deleted since must not come back.
                    if self._load(connection, manifest.session_id) == manifest:
                        manifests.cut(connection, short, beyond)
        # One that waits to be saved may be of before.
        self._suspects = waiting if ANYONE in self._suspects else self._suspects & waiting

    def _beyond(self, keys: Sequence[bytes], first: int) -> Chain | None:
        """What is stored of a chain from its page ``first`` on, as far as anything is."""
        held = self._held(keys[first:])
        if not any(held):
            return None
        start, end = first + held.index(True), len(keys) - held[::-1].index(True)
        return Chain(start, head_of(b"".join(keys)), b"".join(keys[start:end]))

    def _save_abandoned(self) -> None:
        """Remember what manifests do not list."""
        with self._changed:
            batch = list(self._abandoned)
        for session_id, beyond in batch:
            try:
                with self._database.write() as connection:
                    manifests.abandon(connection, session_id, self._store, beyond)
            except DatabaseError:
                raise
            except Exception:
                logger.exception("agentstate: what session %r has stored cannot be remembered", session_id)
            with self._changed:
                self._abandoned.remove((session_id, beyond))

    @property
    def _store(self) -> StoreName:
        return StoreName(self._engine.fingerprint, self._engine.rank, self._engine.node)

    def _bury(self) -> None:
        """Drop the manifests of stores that are gone."""
        self._gone += self._dead()
        if self._gone:
            with self._database.write() as connection:
                for fingerprint, rank in self._gone:
                    manifests.forget_store(connection, fingerprint, rank, self._engine.node)
            self._gone = []

    def _learn_key(self) -> None:
        """Read the key before the engine is up: the first request may be the first of a turn."""
        try:
            self._database.check_schema()
            with self._database.write() as connection:
                self.signing_key = turns.signing_key(secret.read(connection))
        except DatabaseError:
            pass  # the heartbeat tries again, before it tells the service that there is an engine

    def _run(self) -> None:
        self._learn_key()
        while not self._closed:
            with self._changed:
                self._changed.wait_for(self._has_work, self._heartbeat_s)
                batch, self._unsaved = self._unsaved, {}
                self._being_written = list(batch.values())
                closing = self._closing
            try:
                self._write(batch, closing)
                self._save_abandoned()
                if self._speaks:
                    self._tell_needed()
                    self._cut()
                self._bury()
                if self._failing:
                    logger.info("agentstate: the database answers again")
                self._failing = False
            except Exception as error:
                if not isinstance(error, DatabaseError):
                    logger.exception("agentstate: writing to the database failed")
                elif not self._failing:
                    logger.warning("agentstate: manifests wait for the database: %s", error)
                self._failing = True
                with self._changed:
                    for manifest in self._unsaved.values():
                        self._replace(batch, manifest)
                    self._unsaved = batch
            self._closed = closing

    def _has_work(self) -> bool:
        # After a failure even waiting manifests wait for the next heartbeat.
        return self._closing or (bool(self._unsaved or self._abandoned) and not self._failing)

    def _write(self, batch: dict[str, Manifest], closing: bool) -> None:
        """Say that the engine lives, then save ``batch``, from which everything that is done with is taken."""
        if not self._schema_checked:
            self._database.check_schema()
            self._schema_checked = True
        reads = self._reads()
        with self._database.write() as connection:
            if closing:
                engines.unregister(connection, self._engine.id)
            elif not engines.heartbeat(connection, self._engine.id, reads):
                engines.register(connection, replace(self._engine, reads=reads))
            # It may have been renewed.
            self.signing_key = turns.signing_key(secret.read(connection))
            of_accounts, pinned = (
                quotas.read(connection),
                pins.of_engine(connection, self._engine.base_url, self._engine.dp_rank),
            )
        if not closing:
            try:
                self._told(of_accounts, pinned)
            except Exception:
                # Manifests do not wait for it.
                logger.exception("agentstate: quotas and pins are not followed for now")
        for manifest in list(batch.values()):
            try:
                with self._database.write() as connection:
                    published = manifests.publish(connection, manifest)
            except DatabaseError:
                raise
            except Exception:
                # Not the database's state but this manifest: another attempt would fail alike.
                logger.exception("agentstate: the manifest of session %r cannot be saved", manifest.session_id)
            else:
                (self._saved if published else self._refused)(manifest)
            del batch[manifest.session_id]
