"""The tables. Their first migration is ``migrations/versions/0001_first_tables.py``; a test proves that both agree.

Times are microseconds since the Unix epoch, from the database's clock (``database.now_us``): integers, so that they
compare alike in every database, and never an order: entries are ordered by ``seq``, changes by ``revision``.
"""

from __future__ import annotations

from enum import StrEnum

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)


class SessionStatus(StrEnum):
    IDLE = "idle"  # created, or its runner's lease lapsed
    RUNNING = "running"  # leased
    SUSPENDED = "suspended"


class EntryKind(StrEnum):
    MESSAGE = "message"
    TOOL_CALL = "tool_call"
    TOOL_RESULT = "tool_result"
    NOTE = "note"


class ToolCallState(StrEnum):
    CLAIMED = "claimed"  # being executed
    DONE = "done"
    FAILED = "failed"
    UNKNOWN = "unknown"  # its claimant vanished: it may have run or not, so it is never run again by itself


class OperationState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


sessions = Table(
    "sessions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False, server_default="default"),
    Column("model", Text, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("cache_salt", Text),
    Column("extra_key", Text),
    Column("status", Text, nullable=False),
    Column("head_entry", Text),  # id of the newest entry
    Column("next_seq", BigInteger, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("updated_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger),
)

entries = Table(
    "entries",
    metadata,
    Column("id", Text, primary_key=True),
    Column("session_id", Text, ForeignKey("sessions.id", ondelete="CASCADE"), nullable=False),
    Column("parent_id", Text),
    Column("seq", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("payload", JSON, nullable=False),
    Column("call_id", Text),
    Column("created_us", BigInteger, nullable=False),
    # Also the index that entries are paged through with.
    UniqueConstraint("session_id", "seq"),
)

tool_calls = Table(
    "tool_calls",
    metadata,
    Column("session_id", Text, ForeignKey("sessions.id", ondelete="CASCADE"), primary_key=True),
    Column("call_id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("expected_s", Float),  # the claimant's own estimate
    Column("call_seq", BigInteger, nullable=False),
    Column("result_seq", BigInteger),
    Column("claimed_us", BigInteger, nullable=False),
    Column("finished_us", BigInteger),
    Index("ix_tool_calls_pending", "session_id", "state"),
    Index("ix_tool_calls_results", "session_id", "result_seq"),
)

leases = Table(
    "leases",
    metadata,
    Column("session_id", Text, ForeignKey("sessions.id", ondelete="CASCADE"), primary_key=True),
    Column("token_hash", LargeBinary),  # SHA-256; null once released. The row stays, for its epoch
    Column("epoch", BigInteger, nullable=False),  # only grows
    Column("expires_us", BigInteger, nullable=False),
)

# No foreign key: engines serve session ids that were never created here, and their pages can be restored too.
manifests = Table(
    "manifests",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("fingerprint", Text, primary_key=True),
    Column("rank", Integer, primary_key=True, autoincrement=False),
    Column("node", Text, nullable=False),
    Column("engine_id", Text, nullable=False),
    Column("page_size", Integer, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("keys", LargeBinary, nullable=False),  # 32 bytes a page, in order
    Column("nbytes", BigInteger, nullable=False),
    Column("updated_us", BigInteger, nullable=False),
)

engines = Table(
    "engines",
    metadata,
    Column("id", Text, primary_key=True),
    Column("node", Text, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("control_address", Text, nullable=False),
    Column("base_url", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("pages_dir", Text, nullable=False),
    Column("started_us", BigInteger, nullable=False),
    Column("heartbeat_us", BigInteger, nullable=False),
)

operations = Table(
    "operations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("owner", Text, nullable=False),  # the service that carries it out: its node and port
    Column("result", JSON),
    Column("created_us", BigInteger, nullable=False),
    Column("finished_us", BigInteger),
)
