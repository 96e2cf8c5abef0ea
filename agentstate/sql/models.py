"""The tables, as the migrations in ``migrations/versions`` make them; a test proves that both agree.

Times are microseconds since the Unix epoch, from the database's clock (``database.now_us``): integers, so that they
compare alike in every database, and never an order: entries are ordered by ``seq``, changes by ``revision``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
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
    false,
    text,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)


def _only_where(condition: str) -> dict[str, Any]:
    return {"postgresql_where": text(condition), "sqlite_where": text(condition)}


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


# What this installation has made up for itself.
settings = Table(
    "settings",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", LargeBinary, nullable=False),
    Column("updated_us", BigInteger, nullable=False),
)

tenants = Table(
    "tenants",
    metadata,
    Column("id", Text, primary_key=True),
    Column("expires_in_s", Float),  # of its sessions that are created without one; null: they do not expire
    Column("requests_per_s", Float),  # null: what the service's settings say
    Column("created_us", BigInteger, nullable=False),
    Column("kv_group", Text),  # whom its new sessions share KV with: null is nobody, "*" everybody, else that group
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, ForeignKey("tenants.id"), nullable=False),
    Column("note", Text, nullable=False),
    Column("secret_hash", LargeBinary, nullable=False, unique=True),  # SHA-256 of what the client sends
    Column("created_us", BigInteger, nullable=False),
    Column("revoked_us", BigInteger),
    Column("role", Text, nullable=False, server_default="operator"),  # what it may do: `sessions.tenants.Role`
)

# Who is signed in to the console, with which key.
console_sessions = Table(
    "console_sessions",
    metadata,
    Column("secret_hash", LargeBinary, primary_key=True),  # SHA-256 of the cookie
    Column("key_id", Text, ForeignKey("api_keys.id", ondelete="CASCADE"), nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger, nullable=False),
    Index("ix_console_sessions_expiry", "expires_us"),
)

# LangGraph's: rows of a session, described by the adapter alone.
CHECKPOINT_TABLES = ("checkpoint_writes", "checkpoint_channels", "checkpoint_blobs", "checkpoints")

sessions = Table(
    "sessions",
    metadata,
    # Never used twice, and what engines know the session by. Clients name a session by ``name``, which is the same
    # unless they chose one, and which is free again once the session is deleted.
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False, server_default="default"),
    Column("name", Text, nullable=False, server_default=text("''")),
    Column("model", Text, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("cache_salt", Text),
    Column("extra_key", Text),
    Column("status", Text, nullable=False),
    Column("head_entry", Text),  # id of the newest entry
    Column("next_seq", BigInteger, nullable=False),
    # The first seq since the last fork or rewind: from here on the history is this session's own. What is before it
    # is in ``segments``.
    Column("own_seq", BigInteger, nullable=False, server_default="1"),
    Column("open_calls", Integer, nullable=False, server_default="0"),  # tool calls without a result
    Column("branched_us", BigInteger, nullable=False, server_default="0"),  # the last fork or rewind
    Column("revision", BigInteger, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("updated_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger),
    Column("deleted_us", BigInteger),  # the row stays while others share its entries
    Column("garbage", Boolean, nullable=False, server_default=false()),  # it may own entries that nothing reaches
    Column("kv_scope", Text),  # who shares its KV; null is everybody who reaches the engine
    Index("ix_sessions_name", "tenant", "name", unique=True),
    Index("ix_sessions_status", "status"),
    Index("ix_sessions_expiry", "expires_us", **_only_where("expires_us IS NOT NULL AND deleted_us IS NULL")),
    Index("ix_sessions_garbage", "id", **_only_where("garbage")),
)

# When the newest turn of each session ended, or it was made: what lists of sessions are ordered by.
session_turns = Table(
    "session_turns",
    metadata,
    Column("session_id", Text, ForeignKey("sessions.id", ondelete="CASCADE"), primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("turned_us", BigInteger, nullable=False),
    Index("ix_session_turns_turned", "tenant", "turned_us", "session_id"),
)

# The part of a session's history that came before its last fork or rewind, as runs of entries by their owner's seq.
segments = Table(
    "segments",
    metadata,
    Column("session_id", Text, ForeignKey("sessions.id", ondelete="CASCADE"), primary_key=True),
    Column("first_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("last_seq", BigInteger, nullable=False),
    Column("owner_id", Text, ForeignKey("sessions.id"), nullable=False),  # itself, after a rewind
    Index("ix_segments_owner", "owner_id"),
)

# Payloads that are too large for a row, stored once a tenant.
blobs = Table(
    "blobs",
    metadata,
    Column("key", LargeBinary, primary_key=True),  # SHA-256 of the tenant and the content
    Column("content", LargeBinary, nullable=False),  # JSON, UTF-8
    Column("used_us", BigInteger, nullable=False),  # when an entry last referred to it
)

entries = Table(
    "entries",
    metadata,
    Column("id", Text, primary_key=True),
    Column("session_id", Text, ForeignKey("sessions.id", ondelete="CASCADE"), nullable=False),  # its owner
    Column("parent_id", Text),
    Column("seq", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("payload", JSON, nullable=False),  # empty where there is a blob
    Column("blob", LargeBinary, ForeignKey("blobs.key")),
    Column("call_id", Text),
    Column("open_calls", Integer, nullable=False, server_default="0"),  # without a result after this entry
    Column("created_us", BigInteger, nullable=False),
    # Also the index that entries are paged through with.
    UniqueConstraint("session_id", "seq"),
    Index("ix_entries_blob", "blob", **_only_where("blob IS NOT NULL")),
)

# The calls of a session. A fork has rows of its own for those that were open at its branch point; the others are its
# parent's, as the entries are.
tool_calls = Table(
    "tool_calls",
    metadata,
    Column("session_id", Text, ForeignKey("sessions.id", ondelete="CASCADE"), primary_key=True),
    # A call id may come again after a rewind, a seq does not.
    Column("call_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("call_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("expected_s", Float),  # the claimant's own estimate
    Column("result_seq", BigInteger),
    Column("claimed_us", BigInteger, nullable=False),
    Column("finished_us", BigInteger),
    Column("head", Text),  # what the command that it runs is known by; empty if it runs none
    Index("ix_tool_calls_call_id", "session_id", "call_id"),
    Index("ix_tool_calls_pending", "session_id", "state"),
    Index("ix_tool_calls_results", "session_id", "result_seq"),
)

# How long tools took, from claim to result: what outlives the sessions that they were called in.
tool_timings = Table(
    "tool_timings",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("finished_us", BigInteger, nullable=False),
    Index("ix_tool_timings_name", "tenant", "name", "finished_us"),
    Index("ix_tool_timings_finished", "finished_us"),
)

# How long the waits of a tenant's sessions last: see `agentstate.fleet.waits`.
durations = Table(
    "durations",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("version", BigInteger, nullable=False),  # how often it was written
    Column("updated_us", BigInteger, nullable=False),
    Column("learned", LargeBinary, nullable=False),  # `lookahead.durations`, dumped
)

# What an account, and what a tenant may have: see `agentstate.fleet.quotas`. Null: no limit.
quotas = Table(
    "quotas",
    metadata,
    Column("account", Text, primary_key=True),
    Column("device_bytes", BigInteger),
    Column("host_bytes", BigInteger),
    Column("nvme_bytes", BigInteger),
    Column("sessions", BigInteger),
    Column("shared_bytes", BigInteger),
)

# Sessions whose KV is to stay: see `agentstate.fleet.pins`.
kv_pins = Table(
    "kv_pins",
    metadata,
    Column("session_id", Text, ForeignKey("sessions.id", ondelete="CASCADE"), primary_key=True),
    Column("tier", Text, nullable=False),
    Column("until_us", BigInteger, nullable=False),
    Index("ix_kv_pins_until", "until_us"),
)

leases = Table(
    "leases",
    metadata,
    Column("session_id", Text, ForeignKey("sessions.id", ondelete="CASCADE"), primary_key=True),
    Column("token_hash", LargeBinary),  # SHA-256; null once released. The row stays, for its epoch
    Column("epoch", BigInteger, nullable=False),  # only grows
    Column("expires_us", BigInteger, nullable=False),
    Column("engine", Text),  # base URL of the engine that the newest resume named; null where there was none
    # The first epoch that may still publish manifests: those before it lapsed and were taken over.
    Column("fence", BigInteger, nullable=False, server_default="0"),
    Column("released_us", BigInteger),  # when the newest turn ended that did not lapse
    Column("waits_for", Text),  # the reason of its suspend
    Column("dp_rank", Integer),  # that the newest resume named; null where the engine has only one
    Index("ix_leases_expiry", "expires_us"),
)

# Where the conversations of gateways' clients stand: see `agentstate.sessions.conversations`.
conversation_tips = Table(
    "conversation_tips",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),  # grows with time
    Column("tenant", Text, nullable=False),
    Column("session_id", Text, ForeignKey("sessions.id", ondelete="CASCADE"), nullable=False),
    Column("digest", LargeBinary, nullable=False),  # of all messages up to and with the answer
    Column("pair", LargeBinary),  # of the last two
    Column("system", LargeBinary, nullable=False),  # of the system messages at the beginning
    Column("messages", Integer, nullable=False),
    Column("head_entry", Text),  # the session's head after that turn
    Column("created_us", BigInteger, nullable=False),
    Index("ix_conversation_tips_digest", "tenant", "digest"),
    Index("ix_conversation_tips_pair", "tenant", "pair", **_only_where("pair IS NOT NULL")),
    Index("ix_conversation_tips_session", "session_id", "id"),
)

# Which entries are items of OpenAI's API, by the ids that clients know the items by: see `agentstate.sessions.items`.
items = Table(
    "items",
    metadata,
    Column("entry_id", Text, ForeignKey("entries.id", ondelete="CASCADE"), primary_key=True),
    Column("session_id", Text, nullable=False),  # the entry's owner
    Column("item_id", Text, nullable=False),
    Column("deletes", Boolean, nullable=False, server_default=false()),  # the entry takes the item away
    Index("ix_items_item", "session_id", "item_id"),
    Index("ix_items_id", "item_id"),
    Index("ix_items_deletions", "session_id", **_only_where("deletes")),
)

# Responses of OpenAI's API that clients may ask for, and go on from: see `agentstate.sessions.responses`.
responses = Table(
    "responses",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("session_id", Text, ForeignKey("sessions.id", ondelete="CASCADE"), nullable=False),
    Column("base_entry", Text),  # what it was given begins after this entry; null: with the session
    Column("input_entry", Text),  # and ends with this one; its output follows
    Column("head_entry", Text),  # the session's head after it
    Column("digest", LargeBinary, nullable=False),  # of all messages up to and with its output
    Column("created_us", BigInteger, nullable=False),
    Column("document", JSON, nullable=False),  # as answered
    Index("ix_responses_session", "session_id", "head_entry"),
)

manifests = Table(
    "manifests",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("fingerprint", Text, primary_key=True),
    Column("rank", Integer, primary_key=True, autoincrement=False),
    Column("node", Text, primary_key=True),  # each node keeps what it stored, whoever runs the session now
    Column("engine_id", Text, nullable=False),
    Column("page_size", Integer, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("nbytes", BigInteger, nullable=False),
    Column("lost_tokens", BigInteger, nullable=False, server_default="0"),  # the session had them; not stored
    Column("updated_us", BigInteger, nullable=False),
    Column("epoch", BigInteger, nullable=False, server_default="0"),  # of the turn that published it
    Column("account", Text, nullable=False, server_default=text("''")),  # whom its bytes are charged to
    Column("shared_tokens", BigInteger, nullable=False, server_default="0"),  # from the head, in the shared store
    # 32 bytes a page, in order. The last column: SQLite reads all that is before the columns that are asked for.
    Column("keys", LargeBinary, nullable=False),
)

_STORE = ("fingerprint", "rank", "node")

# The beginnings of manifests, to sort them by: see `agentstate.fleet.erasures`.
manifest_heads = Table(
    "manifest_heads",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("fingerprint", Text, primary_key=True),
    Column("rank", Integer, primary_key=True, autoincrement=False),
    Column("node", Text, primary_key=True),
    Column("head", LargeBinary, nullable=False),
    Index("ix_manifest_heads_head", *_STORE, "head"),
)

# What a session's manifests listed and list no more, since it went on another way: it is erased with the session.
abandoned_pages = Table(
    "abandoned_pages",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("fingerprint", Text, primary_key=True),
    Column("rank", Integer, primary_key=True, autoincrement=False),
    Column("node", Text, primary_key=True),
    Column("last_key", LargeBinary, primary_key=True),  # covers all that is before it
    Column("first_page", Integer, nullable=False),
    Column("head", LargeBinary, nullable=False),
    Column("abandoned_us", BigInteger, nullable=False),
    Column("keys", LargeBinary, nullable=False),  # from ``first_page`` of the chain on
)

# Pages of what is gone that are on an engine's disk still.
erasures = Table(
    "erasures",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("session_id", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("node", Text, nullable=False),
    Column("first_page", Integer, nullable=False),
    Column("head", LargeBinary, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("keys", LargeBinary, nullable=False),
    Index("ix_erasures_store", *_STORE, "id"),
)

# The shared stores of this installation: see `agentstate.fleet.stores`.
shared_stores = Table(
    "shared_stores",
    metadata,
    Column("id", Text, primary_key=True),  # what its mark says
    Column("url", Text, nullable=False),  # as it was written by who saw it last
    Column("seen_us", BigInteger),  # null: nobody has seen it marked
)

# Extents that are in a shared store: see `agentstate.fleet.extents`.
shared_extents = Table(
    "shared_extents",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("store", Text, nullable=False),  # its id; before anybody has seen its mark, its URL
    Column("fingerprint", Text, nullable=False),
    Column("shard", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("nbytes", BigInteger, nullable=False),  # the object's
    Column("owner", Text, nullable=False),  # the account; empty for nobody's
    Column("writer", Text, nullable=False),  # a node
    Column("created_us", BigInteger, nullable=False),
    Column("changed_us", BigInteger, nullable=False),  # when it was added, doomed or wanted again
    Column("used_us", BigInteger, nullable=False),
    Column("doomed_us", BigInteger),  # null: it is to stay; 0 or less: its object is being deleted, since -doomed_us
    Column("keys", LargeBinary, nullable=False),  # 32 bytes a page, in the order of its slots
    UniqueConstraint("store", "name"),
    Index("ix_shared_extents_changed", "store", "fingerprint", "shard", "changed_us"),
    Index("ix_shared_extents_owner", "store", "owner"),
    Index("ix_shared_extents_doomed", "store", "doomed_us", **_only_where("doomed_us IS NOT NULL")),
    sqlite_autoincrement=True,  # an id is of one extent for good: engines keep them
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
    Column("control_secret", Text),  # null: the engine is of a release that had none
    Column("shared_store", Text, nullable=False, server_default=text("''")),  # its URL; empty: it uses none
    Column("dp_rank", Integer, nullable=False, server_default="0"),  # which one of its server's
    Column("dp_size", Integer, nullable=False, server_default="1"),  # how many those are
    # The ids of the other nodes of its machine whose pages it reads, with blanks between them.
    Column("reads", Text, nullable=False, server_default=text("''")),
    Column("phase", Text, nullable=False, server_default=text("''")),  # 'prefill', 'decode'; empty: it does both
)

operations = Table(
    "operations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False, server_default="default"),
    Column("kind", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("owner", Text, nullable=False),  # the service that carries it out: its node and port
    Column("result", JSON),
    Column("created_us", BigInteger, nullable=False),
    Column("finished_us", BigInteger),
    Index("ix_operations_created", "created_us"),
)

# What was answered to a write that came with an Idempotency-Key, in the transaction of that write.
idempotency = Table(
    "idempotency",
    metadata,
    Column("key", LargeBinary, primary_key=True),  # SHA-256 of the tenant and the client's key
    Column("request_hash", LargeBinary, nullable=False),
    Column("answer", JSON, nullable=False),
    Column("final", Boolean, nullable=False),  # false while the answer waits for an engine
    Column("created_us", BigInteger, nullable=False),
    Index("ix_idempotency_created", "created_us"),
)
