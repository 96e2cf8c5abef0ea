"""What agents keep their conversations in today, on the same conversations as the service: libraries that an agent's
process calls, so there is no server side besides the database's.

Every peer is used as its documentation shows, with its own defaults, on a database of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache
from importlib import metadata
from typing import Any, Self

import sqlalchemy as sa

from agentstate.benchmarks.conversations import BATCH, message, names

ADDED = 2  # messages that a turn adds: what was asked, and what was answered
POOL = 20  # as many connections as the service may have


class Peer(ABC):
    """A store of conversations, opened on one event loop. ``reads`` and ``writes`` are the operations that it has."""

    name: str
    packages: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    def __init__(self) -> None:
        self._closing = AsyncExitStack()

    @abstractmethod
    async def open(self, url: sa.URL) -> None:
        """Connect to the SQLite file or the PostgreSQL database at ``url``, and make the tables. Raises ImportError if
        a package is missing."""

    @abstractmethod
    async def fill(self, counts: Mapping[int, int], advance: Callable[[int], None]) -> None:
        """Write ``counts[length]`` conversations of ``length`` messages each."""

    @abstractmethod
    async def run(self, operation: str, conversation: str, length: int) -> None:
        """Carry out one of ``reads`` or ``writes``. Raises RuntimeError if a read brings less than is there."""

    @abstractmethod
    async def scalar(self, statement: str) -> Any:
        """What a statement answers on a connection of its own."""

    def versions(self) -> dict[str, str]:
        return {package: metadata.version(package) for package in self.packages}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._closing.aclose()


class SqlAlchemySessions(Peer):
    """The OpenAI Agents SDK's session on SQLAlchemy."""

    name = "SQLAlchemySession"
    packages = ("openai-agents",)
    reads = ("get_items", "get_items(limit=50)")
    writes = ("add_items",)

    async def open(self, url: sa.URL) -> None:
        from agents.extensions.memory import SQLAlchemySession
        from sqlalchemy.ext.asyncio import create_async_engine

        drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
        self._engine = create_async_engine(url.set(drivername=drivers[url.get_backend_name()]))
        self._closing.push_async_callback(self._engine.dispose)
        # An agent has its session at hand.
        self._session = cache(lambda name: SQLAlchemySession(name, engine=self._engine))
        # Asking for items creates the tables.
        await SQLAlchemySession("", engine=self._engine, create_tables=True).get_items()

    async def fill(self, counts: Mapping[int, int], advance: Callable[[int], None]) -> None:
        session = self._session("")
        for length, count in counts.items():
            some = max(1, BATCH // length)
            called = names(length, count)
            for start in range(0, count, some):
                batch = called[start : start + some]
                # The statements of its add_items, for many sessions at once.
                rows = [
                    {"session_id": name, "message_data": await session._serialize_item(message(number))}
                    for name in batch
                    for number in range(length)
                ]
                async with self._engine.begin() as connection:
                    await connection.execute(sa.insert(session._sessions), [{"session_id": name} for name in batch])
                    await connection.execute(sa.insert(session._messages), rows)
                advance(len(rows))

    async def run(self, operation: str, conversation: str, length: int) -> None:
        session = self._session(conversation)
        if operation == "add_items":
            await session.add_items([message(length + number) for number in range(ADDED)])
            return
        limit = None if operation == "get_items" else 50
        items = await session.get_items(limit)
        if len(items) < (length if limit is None else min(limit, length)) or items[-1].keys() != message(0).keys():
            raise RuntimeError(f"{self.name}: {operation} of {conversation} brought {len(items)} of {length} items")

    async def scalar(self, statement: str) -> Any:
        async with self._engine.connect() as connection:
            return (await connection.exec_driver_sql(statement)).scalar_one()


class LangGraphSaver(Peer):
    """LangGraph's own saver for the database. A thread's state is its messages, as ``MessagesState`` has them. Only its
    newest checkpoint is there, which is the one that ``get_tuple`` reads."""

    reads = ("get_tuple",)
    writes = ("put",)

    def __init__(self, saver: str, package: str):
        super().__init__()
        self.name = saver
        self.packages = ("langgraph", package)

    async def open(self, url: sa.URL) -> None:
        self._url = url
        self._saver: Any
        if url.get_backend_name() == "sqlite":
            from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

            self._saver = await self._closing.enter_async_context(AsyncSqliteSaver.from_conn_string(str(url.database)))
        else:
            from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
            from psycopg.rows import dict_row
            from psycopg_pool import AsyncConnectionPool

            kwargs = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
            dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
            pool = AsyncConnectionPool(dsn, max_size=POOL, kwargs=kwargs, open=False)
            self._saver = AsyncPostgresSaver(await self._closing.enter_async_context(pool))
        await self._saver.setup()

    async def fill(self, counts: Mapping[int, int], advance: Callable[[int], None]) -> None:
        async with self._filling() as saver:
            for length, count in counts.items():
                messages = _langchain_messages(length)
                for name in names(length, count):
                    await self._put(saver, name, messages)
                    advance(length)

    async def run(self, operation: str, conversation: str, length: int) -> None:
        if operation == "put":
            await self._put(self._saver, conversation, _langchain_messages(length + ADDED))
            return
        found = await self._saver.aget_tuple({"configurable": {"thread_id": conversation, "checkpoint_ns": ""}})
        messages = [] if found is None else found.checkpoint["channel_values"]["messages"]
        if len(messages) < length:
            raise RuntimeError(f"{self.name}: {operation} of {conversation} brought {len(messages)} of {length}")

    async def scalar(self, statement: str) -> Any:
        if self._url.get_backend_name() == "sqlite":
            async with self._saver.conn.execute(statement) as cursor:
                (value,) = await cursor.fetchone()
            return value
        async with self._saver.conn.connection() as connection:
            row = await (await connection.execute(statement)).fetchone()
        return next(iter(row.values()))

    @asynccontextmanager
    async def _filling(self) -> AsyncIterator[Any]:
        """A saver that does not wait for the disk."""
        if self._url.get_backend_name() == "sqlite":
            before = await self.scalar("PRAGMA synchronous")
            await self._saver.conn.execute("PRAGMA synchronous = OFF")
            yield self._saver
            await self._saver.conn.execute(f"PRAGMA synchronous = {before}")
        else:
            async with self._saver.conn.connection() as connection:
                await connection.execute("SET synchronous_commit = off")
                yield type(self._saver)(connection)
                await connection.execute("RESET synchronous_commit")

    async def _put(self, saver: Any, name: str, messages: Sequence[Any]) -> None:
        from langgraph.checkpoint.base import empty_checkpoint

        version = saver.get_next_version(None, None)
        checkpoint = empty_checkpoint()
        checkpoint["channel_values"] = {"messages": messages}
        checkpoint["channel_versions"] = {"messages": version}
        config = {"configurable": {"thread_id": name, "checkpoint_ns": ""}}
        about = {"source": "loop", "step": len(messages), "parents": {}}
        await saver.aput(config, checkpoint, about, {"messages": version})


def alternatives(backend: str) -> list[Peer]:
    """The peers on a database, ``sqlite`` or ``postgresql``; none of them is opened yet."""
    savers = {
        "sqlite": ("AsyncSqliteSaver", "langgraph-checkpoint-sqlite"),
        "postgresql": ("AsyncPostgresSaver", "langgraph-checkpoint-postgres"),
    }
    return [SqlAlchemySessions(), LangGraphSaver(*savers[backend])]


@cache
def _langchain_messages(length: int) -> Sequence[Any]:
    # Made once: a running graph has them, and only keeping them is timed.
    from langchain_core.messages import convert_to_messages

    return convert_to_messages([message(number) for number in range(length)])
