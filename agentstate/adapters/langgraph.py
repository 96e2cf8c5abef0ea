"""LangGraph's checkpoints in AgentState's database: a thread is a session.

::

    with AgentStateSaver.from_url("postgresql://…", model="smollm2") as saver:
        graph = builder.compile(checkpointer=saver)
        with client.turn(thread_id) as turn:           # takes the lease; turn.kv says what can be restored
            graph.invoke(messages, {"configurable": {"thread_id": thread_id}})

A conversation is a channel whose value is a list that grows. The items of a long list are stored separately, each under
the digest of its bytes, so a step writes only the items that it added. Full runs of `RUN` items at the start of a list
are stored as one blob each, so a value stays a short list of digests.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgpack
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    ChannelVersions,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
    PendingWrite,
    get_checkpoint_id,
    get_serializable_checkpoint_metadata,
)
from langgraph.checkpoint.base import Checkpoint as GraphCheckpoint
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from agentstate import documents, ids
from agentstate.adapters.checkpoints import PAGE, Checkpoint, Checkpoints, Loaded, Value, Write
from agentstate.settings import DEFAULT_TENANT, Settings
from agentstate.sql.database import Database

RUN = 64
SPLIT_BYTES = 4096  # smaller lists are stored whole


class AgentStateSaver(BaseCheckpointSaver[str]):
    """A checkpoint saver, synchronous and asynchronous, on a database that has AgentState's schema.

    A new thread's session is created with ``model``, the name under which an engine serves it; an existing session
    keeps its own. Values are stored as JSON or msgpack; a ``serde`` that falls back to pickle is refused (ValueError).
    Long lists are stored item by item with LangGraph's default serde only: another one, such as an encrypting one, may
    give the same item different bytes every time.

    Its threads are the sessions of ``tenant``; it does not see those of others. It needs no API key, because it uses
    the database directly.

    Thread ids may be anything whose text is a valid session id, such as UUIDs; otherwise InvalidId is raised. Every
    method may raise DatabaseError. A thread whose session has expired can be neither read nor written (SessionExpired).
    If a session is deleted during a run, the run ends with SessionNotFound. The saver neither takes nor requires a
    lease: two concurrent runs of one thread make two branches; neither loses a checkpoint, and the highest checkpoint
    id is the thread's newest. To run one at a time, run the graph in a turn.
    """

    def __init__(
        self,
        database: Database,
        *,
        model: str,
        tenant: str = DEFAULT_TENANT,
        serde: SerializerProtocol | None = None,
    ):
        super().__init__(serde=serde)
        if getattr(self.serde, "pickle_fallback", False):
            raise ValueError("AgentStateSaver stores no pickles: give it a serde without pickle_fallback")
        self._store = Checkpoints(database, model, tenant)

    @classmethod
    @contextmanager
    def from_url(
        cls,
        url: str | None = None,
        *,
        model: str,
        tenant: str = DEFAULT_TENANT,
        serde: SerializerProtocol | None = None,
    ) -> Iterator[AgentStateSaver]:
        """A saver with its own database connection, closed at the end; by default to AGENTSTATE_DATABASE_URL.

        Raises SettingsError, DatabaseUnreachable, SchemaOutdated, SchemaNewer.
        """
        settings = Settings() if url is None else Settings(database_url=url)
        database = Database(settings.sqlalchemy_url)
        try:
            database.check_schema()
            yield cls(database, model=model, tenant=tenant, serde=serde)
        finally:
            database.close()

    def get_next_version(self, current: str | None, channel: None) -> str:
        """The next version. Versions grow, and no two branches of a thread create the same one."""
        step = 0 if current is None else int(str(current).partition(".")[0])
        return f"{step + 1:032}.{secrets.token_hex(8)}"

    # --- storing

    def put(
        self,
        config: RunnableConfig,
        checkpoint: GraphCheckpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        thread_id, namespace = _thread(config)
        values = checkpoint["channel_values"]
        apart = ("channel_values", "channel_versions")
        encoding, body = self.serde.dumps_typed({name: v for name, v in checkpoint.items() if name not in apart})
        shown: dict[str, Any] = documents.finite({**get_serializable_checkpoint_metadata(config, metadata)})
        self._store.put(
            Checkpoint(
                thread_id=thread_id,
                namespace=namespace,
                id=checkpoint["id"],
                parent_id=get_checkpoint_id(config),
                run_id=None if shown.get("run_id") is None else str(shown["run_id"]),
                metadata=shown,
                versions=checkpoint["channel_versions"],
                encoding=encoding,
                body=body,
            ),
            # An empty channel has no value to store.
            {name: self._encode(values[name]) for name in new_versions if name in values},
        )
        return _config(thread_id, namespace, checkpoint["id"])

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        thread_id, namespace = _thread(config)
        self._store.put_writes(
            thread_id,
            namespace,
            config["configurable"]["checkpoint_id"],
            [
                Write(
                    task_id,
                    WRITES_IDX_MAP.get(channel, index),
                    task_path,
                    channel,
                    Value(*self.serde.dumps_typed(value)),
                )
                for index, (channel, value) in enumerate(writes)
            ],
        )

    # --- reading

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        found = self._store.get(*_thread(config), get_checkpoint_id(config))
        return None if found is None else self._tuple(found)

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        left, start, more = limit, None, True
        while more and (left is None or left > 0):
            found, start = self._page(config, filter, before, left, start)
            more = start is not None
            yield from found[:left]
            left = None if left is None else left - len(found)

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        target = self._store.get(*_thread(config), get_checkpoint_id(config)) if channels else None
        newest_first: dict[str, list[PendingWrite]] = {name: [] for name in channels}
        seeds: dict[str, Any] = {}
        open_channels = set(channels)
        for ancestor in self._store.ancestors(target.checkpoint, open_channels) if target else ():
            for write in reversed(ancestor.writes):
                if write.channel in open_channels:
                    newest_first[write.channel].append(self._write(write))
            for name in open_channels & ancestor.channels.keys():
                seeds[name] = self._decode(ancestor.channels[name])
            open_channels -= ancestor.channels.keys()
            if not open_channels:
                break
        histories: dict[str, DeltaChannelHistory] = {}
        for name, writes in newest_first.items():
            histories[name] = {"writes": writes[::-1]}
            if name in seeds:
                histories[name]["seed"] = seeds[name]
        return histories

    # --- deleting and copying

    def delete_thread(self, thread_id: str) -> None:
        """Delete a thread's checkpoints. The session stays; deleting the session deletes its checkpoints too."""
        self._store.delete_thread(_id(thread_id))

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        self._store.delete_runs([str(run_id) for run_id in run_ids])

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        self._store.copy_thread(_id(source_thread_id), _id(target_thread_id))

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Raises ValueError for a strategy other than ``keep_latest`` and ``delete``."""
        if strategy not in ("keep_latest", "delete"):
            raise ValueError(f"there is no pruning strategy {strategy!r}: use 'keep_latest' or 'delete'")
        for thread_id in thread_ids:
            if strategy == "delete":
                self._store.delete_thread(_id(thread_id))
            else:
                self._store.prune(_id(thread_id))

    # --- the same, asynchronously: in a thread, because each is one short wait for the database

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: GraphCheckpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        return await asyncio.to_thread(self.put, config, checkpoint, metadata, new_versions)

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        await asyncio.to_thread(self.put_writes, config, writes, task_id, task_path)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return await asyncio.to_thread(self.get_tuple, config)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        tuples = self.list(config, filter=filter, before=before, limit=limit)
        while (found := await asyncio.to_thread(next, tuples, None)) is not None:
            yield found

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        return await asyncio.to_thread(self.get_delta_channel_history, config=config, channels=channels)

    async def adelete_thread(self, thread_id: str) -> None:
        await asyncio.to_thread(self.delete_thread, thread_id)

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        await asyncio.to_thread(self.delete_for_runs, run_ids)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        await asyncio.to_thread(self.copy_thread, source_thread_id, target_thread_id)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        await asyncio.to_thread(self.prune, thread_ids, strategy=strategy)

    # --- values

    def _page(
        self,
        config: RunnableConfig | None,
        filter: dict[str, Any] | None,
        before: RunnableConfig | None,
        limit: int | None,
        after: Checkpoint | None,
    ) -> tuple[Sequence[CheckpointTuple], Checkpoint | None]:
        place = config["configurable"] if config else {}
        found, start = self._store.page(
            thread_id=_id(place["thread_id"]) if config else None,
            namespace=place.get("checkpoint_ns"),
            checkpoint_id=place.get("checkpoint_id"),
            before=get_checkpoint_id(before) if before else None,
            metadata=filter,
            after=after,
            limit=PAGE if filter or limit is None else min(PAGE, limit),
        )
        return [self._tuple(each) for each in found], start

    def _tuple(self, loaded: Loaded) -> CheckpointTuple:
        stored = loaded.checkpoint
        rest = self.serde.loads_typed((stored.encoding, stored.body))
        values = {name: self._decode(value) for name, value in loaded.channels.items()}
        checkpoint: Any = {**rest, "channel_values": values, "channel_versions": stored.versions}
        metadata: Any = stored.metadata
        parent = stored.parent_id and _config(stored.thread_id, stored.namespace, stored.parent_id)
        return CheckpointTuple(
            config=_config(stored.thread_id, stored.namespace, stored.id),
            checkpoint=checkpoint,
            metadata=metadata,
            parent_config=parent or None,
            pending_writes=[self._write(write) for write in loaded.writes],
        )

    def _write(self, write: Write) -> PendingWrite:
        return (write.task_id, write.channel, self._decode(write.value))

    def _encode(self, value: Any) -> Value:
        if type(value) is list and type(self.serde) is JsonPlusSerializer:
            items = [self.serde.dumps_typed(item) for item in value]
            if sum(len(body) for _, body in items) >= SPLIT_BYTES:
                return _split(items)
        return Value(*self.serde.dumps_typed(value))

    def _decode(self, value: Value) -> Any:
        if value.encoding is not None:
            return self.serde.loads_typed((value.encoding, value.body))
        return [
            self.serde.loads_typed((encoding, body))
            for digest in value.digests
            for encoding, body in msgpack.unpackb(value.blobs[digest])
        ]


def _split(items: Sequence[tuple[str, bytes]]) -> Value:
    """A list as blobs: full runs of `RUN` items, then one blob for each remaining item."""
    runs = len(items) // RUN * RUN
    groups = [items[at : at + RUN] for at in range(0, runs, RUN)] + [[item] for item in items[runs:]]
    bodies = [msgpack.packb(group) for group in groups]
    digests = [hashlib.sha256(body).digest() for body in bodies]
    return Value(None, b"".join(digests), dict(zip(digests, bodies, strict=True)))


def _id(thread_id: Any) -> str:
    """A thread's id, which is a session id. Raises InvalidId."""
    return ids.check(str(thread_id))


def _thread(config: RunnableConfig) -> tuple[str, str]:
    place = config["configurable"]
    return _id(place["thread_id"]), place.get("checkpoint_ns", "")


def _config(thread_id: str, namespace: str, checkpoint_id: str) -> RunnableConfig:
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": namespace, "checkpoint_id": checkpoint_id}}
