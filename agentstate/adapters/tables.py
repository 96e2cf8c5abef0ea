"""The tables of LangGraph's checkpoints. Their rows belong to the sessions of ``models`` and are deleted with them.

Checkpoints are not entries of a session. Entries are a gapless log that only the lease holder appends to. Checkpoints
have the caller's ids, branch, lie in namespaces, are pruned from the middle, and are written before anyone knows
whether their step succeeds. So a thread **is** a session, with its model, its KV namespace, its lease and its expiry,
and its checkpoints are rows beside its entries.

A step writes only what it changed: a channel's value is stored once per version, and a long list, such as a
conversation, as blobs of its items, which versions share (see ``langgraph.py``).
"""

from __future__ import annotations

from sqlalchemy import JSON, Column, ForeignKey, Index, Integer, LargeBinary, Table, Text

from agentstate.sql.models import metadata

# Checkpoint ids sort by their bytes, whatever the language of the database.
_Bytewise = Text().with_variant(Text(collation="C"), "postgresql")

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("session_id", Text, ForeignKey("sessions.id", ondelete="CASCADE"), primary_key=True),
    Column("namespace", Text, primary_key=True),
    Column("id", _Bytewise, primary_key=True),  # sorts by creation time
    Column("parent_id", Text),
    Column("run_id", Text),
    Column("metadata", JSON, nullable=False),
    Column("versions", JSON, nullable=False),  # of every channel
    Column("encoding", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),  # the rest of the checkpoint, without the channels' values
    Index("ix_checkpoints_run_id", "run_id"),
)

checkpoint_channels = Table(
    "checkpoint_channels",
    metadata,
    Column("session_id", Text, ForeignKey("sessions.id", ondelete="CASCADE"), primary_key=True),
    Column("namespace", Text, primary_key=True),
    Column("channel", Text, primary_key=True),
    Column("version", Text, primary_key=True),
    Column("encoding", Text),  # null: the body is the digests of the blobs that make up a list
    Column("body", LargeBinary, nullable=False),
)

checkpoint_blobs = Table(
    "checkpoint_blobs",
    metadata,
    Column("session_id", Text, ForeignKey("sessions.id", ondelete="CASCADE"), primary_key=True),
    Column("digest", LargeBinary, primary_key=True),  # SHA-256 of the body
    Column("body", LargeBinary, nullable=False),  # msgpack: a run of items, each an encoding and bytes
)

# No foreign key to checkpoints: a step's writes may arrive before the checkpoint that it started from.
checkpoint_writes = Table(
    "checkpoint_writes",
    metadata,
    Column("session_id", Text, ForeignKey("sessions.id", ondelete="CASCADE"), primary_key=True),
    Column("namespace", Text, primary_key=True),
    Column("checkpoint_id", Text, primary_key=True),
    Column("task_id", Text, primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),  # negative for LangGraph's special channels
    Column("task_path", Text, nullable=False),
    Column("channel", Text, nullable=False),
    Column("encoding", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
)
