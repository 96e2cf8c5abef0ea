"""Whose a shared store is. Rows of extents go by what the store says that it is, its mark: so two ways to write its URL
mean one store, and an installation, which is one database, deletes nothing in a store that another one has.

An id is in SQL before it is proposed as the mark. So whoever dies in between, the installation knows its own store.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.errors import TierForeign
from agentstate.sql.database import Database, insert, now_us
from agentstate.sql.models import shared_extents, shared_stores
from agentstate.tiers import Tier


def known(connection: Connection, url: str) -> str | None:
    """The id of the store that was last seen at ``url``."""
    seen = sa.select(shared_stores.c.id).where(shared_stores.c.url == url, shared_stores.c.seen_us.is_not(None))
    found: str | None = connection.execute(seen.order_by(shared_stores.c.seen_us.desc()).limit(1)).scalar()
    return found


def identify(
    database: Database, tier: Tier, url: str, answer: Callable[[Future[Any]], Any] = lambda future: future.result()
) -> str:
    """The id of the store at ``url``, as ``answer`` gets it from the store; one that is new is marked. Rows of before,
    which go by the URL, go by the id from now on.

    Raises TierForeign if the database does not know the store: it is another installation's, or it is not where it was
    (`claim` takes it all the same). Raises TierError if the store does not say.
    """
    mark: str | None = answer(tier.mark())
    if mark is None:
        with database.write() as connection:
            if known(connection, url) is not None:
                raise _unmarked(database, url)
            proposed = _proposed(connection, url)
        mark = answer(tier.mark(proposed))
    assert mark is not None
    with database.write() as connection:
        if not _is_ours(connection, mark, url):
            raise _unknown(database, url)
        _enter(connection, mark, url)
    return mark


def look(database: Database, tier: Tier, url: str, timeout_s: float) -> str | None:
    """The mark of the store at ``url``; None for a new one, which the first engine marks. Changes nothing. Raises
    TierForeign where `identify` would, TierError, and TimeoutError if the store does not answer in time."""
    mark = tier.mark().result(timeout_s)
    with database.read() as connection:
        if mark is None and known(connection, url) is not None:
            raise _unmarked(database, url)
        if mark is not None and not _is_ours(connection, mark, url):
            raise _unknown(database, url)
    return mark


def claim(database: Database, tier: Tier, url: str) -> str:
    """Let this installation have the store at ``url``, whoever had it, and whatever was there before: its id. What the
    database does not list there will be deleted. Raises TierError."""
    mark = tier.mark().result()
    if mark is None:
        mark = tier.mark(uuid.uuid4().hex).result()
    assert mark is not None
    with database.write() as connection:
        _enter(connection, mark, url)
    return mark


def _is_ours(connection: Connection, mark: str, url: str) -> bool:
    of_mark = sa.select(shared_stores.c.id).where(shared_stores.c.id == mark)
    of_before = sa.select(shared_extents.c.id).where(shared_extents.c.store == url).limit(1)
    return connection.execute(of_mark).scalar() is not None or connection.execute(of_before).scalar() is not None


def _unmarked(database: Database, url: str) -> TierForeign:
    return TierForeign(
        f"{url} has no mark of AgentState, though {database.url} knows a store there: is it mounted? If it "
        "was replaced or emptied, run `agentstate pages claim`"
    )


def _unknown(database: Database, url: str) -> TierForeign:
    return TierForeign(
        f"{url} is a store that {database.url} does not know: another installation uses it, whose pages would "
        "be deleted. Set another AGENTSTATE_SHARED_STORE, or, if it is to be this installation's from now on, "
        "run `agentstate pages claim`"
    )


def _proposed(connection: Connection, url: str) -> str:
    """An id for a store that has none: the one that somebody proposed who died, if there is one."""
    found: str | None = connection.execute(
        sa.select(shared_stores.c.id).where(shared_stores.c.url == url).order_by(shared_stores.c.id).limit(1)
    ).scalar()
    if found is None:
        found = uuid.uuid4().hex
        connection.execute(sa.insert(shared_stores).values(id=found, url=url))
    return found


def _enter(connection: Connection, id: str, url: str) -> None:
    """Note that a store was seen, and give it the rows that go by its URL."""
    seen = {"url": url, "seen_us": now_us()}
    connection.execute(
        insert(connection.dialect.name, shared_stores)
        .values(id=id, **seen)
        .on_conflict_do_update(index_elements=["id"], set_=seen)
    )
    of_url = shared_extents.c.store == url
    same = shared_extents.alias()
    twice = sa.exists().where(same.c.store == id, same.c.name == shared_extents.c.name)
    connection.execute(sa.delete(shared_extents).where(of_url, twice))
    connection.execute(sa.update(shared_extents).where(of_url).values(store=id, changed_us=now_us()))
