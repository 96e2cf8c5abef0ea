"""What writers share: turns, transactions, and no failures."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from agentstate.errors import DatabaseError, SessionExists, SessionNotFound
from agentstate.sessions.verbs import Sessions
from agentstate.sql import database
from agentstate.sql.batches import Batcher, Turnstile
from agentstate.sql.database import Database
from agentstate.sql.models import session_turns, sessions

PATIENCE_S = 60


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.setattr(database, "TOGETHER_S", float(PATIENCE_S))  # however slow the machine is
    with closing(Database(f"sqlite:///{tmp_path}/agentstate.db")) as made:
        made.upgrade()
        yield made


@contextmanager
def held(database: Database) -> Iterator[None]:
    """What is submitted meanwhile is carried out together, afterwards."""
    begun, gate = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert gate.wait(PATIENCE_S)

    holding = database.submit(hold)
    assert begun.wait(PATIENCE_S)
    try:
        yield
    finally:
        gate.set()
        holding.result(PATIENCE_S)


def names(database: Database) -> set[str]:
    with database.read() as connection:
        return set(connection.execute(sa.select(sessions.c.name)).scalars())


def commits(database: Database) -> list[None]:
    seen: list[None] = []
    sa.event.listen(database._writer, "commit", lambda connection: seen.append(None))
    return seen


def test_what_gathers_shares_a_transaction_and_fails_alone(embedded: Database) -> None:
    verbs = Sessions(embedded, 30.0)
    told: list[str] = []

    def create(name: str) -> Callable[[], None]:
        def act() -> None:
            with embedded.write():
                embedded.once_committed(lambda: told.append(name))
                verbs.create("m", session_id=name)

        return act

    def half() -> None:
        with embedded.write():
            embedded.once_committed(lambda: told.append("half"))
            verbs.create("m", session_id="half")
            raise RuntimeError("broken")

    with held(embedded):
        seen = commits(embedded)
        good = [embedded.submit(create(name)) for name in ("a", "b")]
        twice, broken = embedded.submit(create("a")), embedded.submit(half)
        last = embedded.submit(create("c"))
    for future in (*good, last):
        assert future.result(PATIENCE_S) is None
    with pytest.raises(SessionExists):
        twice.result(PATIENCE_S)
    with pytest.raises(RuntimeError, match="broken"):
        broken.result(PATIENCE_S)
    assert names(embedded) == {"a", "b", "c"}
    assert told == ["a", "b", "c"]
    assert len(seen) == 2, "one of what held them, and one of theirs"


def test_an_act_goes_on_after_a_part_of_it_that_was_rolled_back(embedded: Database) -> None:
    verbs = Sessions(embedded, 30.0)

    def twice() -> str:
        try:
            with embedded.write():
                verbs.create("m", session_id="first")
                verbs.read("nobody")
        except SessionNotFound:
            verbs.create("m", session_id="second")
        return "done"

    with held(embedded):
        before, acted = embedded.submit(lambda: verbs.create("m", session_id="before")), embedded.submit(twice)
    assert acted.result(PATIENCE_S) == "done" and before.result(PATIENCE_S).id == "before"
    assert names(embedded) == {"before", "second"}


def test_nobody_is_told_before_the_commit_and_if_it_fails_all_learn_that(embedded: Database) -> None:
    verbs = Sessions(embedded, 30.0)
    seen: list[bool] = []

    commits: list[None] = []

    def refuse(_: Any) -> None:
        commits.append(None)
        if len(commits) == 2:  # after that of what holds them
            seen.extend(future.done() for future in (*good, own))
            raise sa.exc.OperationalError("COMMIT", {}, sqlite3.OperationalError("disk I/O error"))

    sa.event.listen(embedded._writer, "commit", refuse)
    with held(embedded):
        good = [embedded.submit(lambda name=name: verbs.create("m", session_id=name)) for name in "ab"]
        own = embedded.submit(lambda: verbs.update("nobody", None, metadata={}))
    for future in good:
        with pytest.raises(DatabaseError, match="disk I/O error"):
            future.result(PATIENCE_S)
    with pytest.raises(SessionNotFound):
        own.result(PATIENCE_S)
    assert seen == [False, False, False]
    assert names(embedded) == set()
    assert embedded.submit(lambda: verbs.create("m", session_id="c")).result(PATIENCE_S).id == "c"


def test_an_error_that_ends_the_transaction_fails_all_of_it(embedded: Database) -> None:
    """As a full disk does: SQLite rolls back by itself."""
    verbs = Sessions(embedded, 30.0)

    def end() -> None:
        with embedded.write() as connection:
            driver: Any = connection.connection.driver_connection
            driver.rollback()
            raise RuntimeError("the disk is full")

    def go_on() -> None:
        try:
            end()
        except RuntimeError:
            verbs.create("m", session_id="after")

    for act in (end, go_on):
        with held(embedded):
            before = embedded.submit(lambda: verbs.create("m", session_id="before"))
            ended = embedded.submit(act)
            after = embedded.submit(lambda: verbs.create("m", session_id="later"))
        with pytest.raises(DatabaseError, match="try again"):
            before.result(PATIENCE_S)
        with pytest.raises((RuntimeError, DatabaseError)):
            ended.result(PATIENCE_S)
        with pytest.raises(DatabaseError, match="try again"):
            after.result(PATIENCE_S)
        assert names(embedded) == set()


def test_what_takes_long_shares_no_transaction(embedded: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "TOGETHER_S", -1.0)
    verbs = Sessions(embedded, 30.0)
    with held(embedded):
        seen = commits(embedded)
        good = [embedded.submit(lambda name=name: verbs.create("m", session_id=name)) for name in ("a", "b")]
        twice = embedded.submit(lambda: verbs.create("m", session_id="a"))
        last = embedded.submit(lambda: verbs.create("m", session_id="c"))
    assert [future.result(PATIENCE_S).id for future in (*good, last)] == ["a", "b", "c"]
    with pytest.raises(SessionExists):
        twice.result(PATIENCE_S)
    assert names(embedded) == {"a", "b", "c"}
    assert len(seen) == 5, "one of what held them, and one of each"


WRITER = """
import sys
from agentstate.sessions.verbs import Sessions
from agentstate.sql.database import Database

database = Database(sys.argv[1])
verbs = Sessions(database, 30.0)
number = 0
while True:
    waiting = []
    for _ in range(40):
        number += 1
        name = f"s{number}"
        future = database.submit(lambda name=name: verbs.create("m", session_id=name))
        future.add_done_callback(lambda done, name=name: done.exception() or print(name, flush=True))
        waiting.append(future)
        waiting.append(database.submit(lambda name=name: verbs.create("m", session_id=name)))  # it fails
    for future in waiting:
        future.exception()
"""


def test_what_was_acknowledged_is_there_after_a_kill(embedded: Database) -> None:
    """Of a process that is killed amid its commits: each of them holds many writes, every second of which fails."""
    acknowledged: list[str] = []
    for number in range(4):
        with embedded.write() as connection:
            connection.execute(sa.delete(sessions))
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, embedded._url.render_as_string()], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        acknowledged = [writer.stdout.readline().strip() for _ in range(150 + 37 * number)]
        writer.kill()
        acknowledged += writer.stdout.read().split("\n")[:-1]
        writer.wait(PATIENCE_S)
        assert len(acknowledged) == len(set(acknowledged))
        there = names(embedded)
        assert set(acknowledged) <= there
        with embedded.read() as connection:
            noted = sa.select(sa.func.count()).select_from(sessions.outerjoin(session_turns))
            whole = noted.where(session_turns.c.session_id.is_not(None))
            assert connection.execute(whole).scalar_one() == len(there), "none is half there"


def test_what_was_cancelled_is_not_carried_out(embedded: Database) -> None:
    verbs = Sessions(embedded, 30.0)
    with held(embedded):
        future: Future[Any] = embedded.submit(lambda: verbs.create("m", session_id="a"))
        assert future.cancel()
        kept = embedded.submit(lambda: verbs.create("m", session_id="b"))
    assert kept.result(PATIENCE_S).id == "b"
    assert names(embedded) == {"b"}


def test_a_batch_has_no_more_than_it_may() -> None:
    begun, gate = threading.Event(), threading.Event()
    sizes: list[int] = []

    def carry_out(jobs: Any) -> None:
        sizes.append(len(jobs))
        for job in jobs:
            job.run()
            job.tell()

    batcher = Batcher(carry_out, 3, "test")
    first = batcher.submit(lambda: (begun.set(), gate.wait(PATIENCE_S))[1])
    assert begun.wait(PATIENCE_S)
    rest = [batcher.submit(lambda number=number: number) for number in range(7)]
    gate.set()
    batcher.shutdown()
    assert first.result(0) and [future.result(0) for future in rest] == list(range(7))
    assert sizes == [1, 3, 3, 1]


def test_whatever_is_raised_the_thread_goes_on() -> None:
    def carry_out(jobs: Any) -> None:
        for job in jobs:
            job.run()
            if job.error is not None:
                raise SystemExit("ended")
            job.tell()

    batcher = Batcher(carry_out, 1, "test")

    def fail() -> None:
        raise ValueError("its own error")

    failed, good = batcher.submit(fail), batcher.submit(lambda: "good")
    with pytest.raises(ValueError, match="its own error"):
        failed.result(PATIENCE_S)
    assert good.result(PATIENCE_S) == "good"
    batcher.shutdown()


def test_what_fails_after_the_commit_changes_no_answer(embedded: Database) -> None:
    def end() -> None:
        raise SystemExit("ended")

    def act(name: str) -> str:
        with embedded.write():
            embedded.once_committed(end)
            return Sessions(embedded, 30.0).create("m", session_id=name).id

    assert [embedded.submit(lambda name=name: act(name)).result(PATIENCE_S) for name in "ab"] == ["a", "b"]
    assert names(embedded) == {"a", "b"}


def test_turns_come_in_the_order_of_asking() -> None:
    turns = Turnstile()
    assert turns.acquire(0)
    came: list[int] = []

    def wait(number: int) -> None:
        assert turns.acquire(PATIENCE_S)
        came.append(number)
        turns.release()

    threads = []
    for number in range(5):
        threads.append(threading.Thread(target=wait, args=(number,)))
        threads[-1].start()
        while len(turns._waiting) <= number:
            assert threads[-1].is_alive()
    assert not turns.acquire(0.001) and len(turns._waiting) == 5
    turns.release()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert came == list(range(5))
    assert turns.acquire(0)
