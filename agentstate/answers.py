"""The answers of the HTTP API. The service writes them and the client reads them, so both share one definition.

Times are RFC 3339 in UTC. ``revision`` is opaque: it changes whenever its session does. A reader ignores unknown
fields, so the service may add some.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from agentstate.fleet.engines import Phase
from agentstate.fleet.manifests import Durability, KvState
from agentstate.sql.models import EntryKind, OperationState, SessionStatus, ToolCallState

_SESSION = {
    "id": "ses_01k8z3v9q4e7w2m5n8r1t6y0ab",
    "model": "smollm2",
    "metadata": {"user": "u_17"},
    "cache_salt": None,
    "extra_key": None,
    "status": "running",
    "head_id": "ent_01k8z3vb1r9d0c3f6h8j2k4m5n",
    "revision": "12",
    "created_at": "2026-01-05T09:30:00Z",
    "updated_at": "2026-01-05T09:31:12.512000Z",
    "expires_at": None,
}
_ENTRY = {
    "id": "ent_01k8z3vb1r9d0c3f6h8j2k4m5n",
    "session_id": _SESSION["id"],
    "parent_id": None,
    "seq": 1,
    "kind": "message",
    "payload": {"role": "user", "content": "What is in the report?"},
    "call_id": None,
    "created_at": "2026-01-05T09:31:12.512000Z",
}
_ENTRIES = {
    "object": "list",
    "data": [_ENTRY],
    "first_id": _ENTRY["id"],
    "last_id": _ENTRY["id"],
    "has_more": False,
}
_DECISION = {
    "id": "1767605472512000",
    "at": "2026-01-05T09:31:12.512000Z",
    "session_id": _SESSION["id"],
    "decision": "fetch",
    "outcome": "begun",
    "tokens": 18432,
    "index": 0.21,
    "displaced": 0.02,
}
_LEASE = {"token": "q0vT3…", "epoch": 8, "expires_at": "2026-01-05T09:32:12.512000Z"}


def _example(example: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [example]})


class Session(BaseModel):
    model_config = _example(_SESSION)

    id: str
    model: str
    metadata: dict[str, Any]
    cache_salt: str | None
    extra_key: str | None
    status: SessionStatus
    head_id: str | None = Field(description="The newest entry.")
    revision: str
    created_at: datetime
    updated_at: datetime
    expires_at: datetime | None


class Entry(BaseModel):
    model_config = _example(_ENTRY)

    id: str
    session_id: str
    parent_id: str | None
    seq: int = Field(description="Grows along the history from 1; a rewind does not reuse the numbers it took back.")
    kind: EntryKind
    payload: dict[str, Any]
    call_id: str | None
    created_at: datetime


class Rewound(BaseModel):
    """A rewind took back the session's entries after ``seq`` (0: all)."""

    session_id: str
    seq: int


class EntryList(BaseModel):
    model_config = _example(_ENTRIES)

    object: Literal["list"] = "list"
    data: list[Entry]
    first_id: str | None
    last_id: str | None
    has_more: bool = Field(description="Whether more follow in the direction read; for a tail, older ones.")


class SessionList(BaseModel):
    model_config = _example(
        {
            "object": "list",
            "data": [_SESSION],
            "first_id": _SESSION["id"],
            "last_id": _SESSION["id"],
            "has_more": False,
        }
    )

    object: Literal["list"] = "list"
    data: list[Session]
    first_id: str | None
    last_id: str | None
    has_more: bool


class AppendedEntries(EntryList):
    model_config = _example({**_ENTRIES, "revision": "13"})

    revision: str = Field(description="The session's revision after the append.")


class Lease(BaseModel):
    model_config = _example(_LEASE)

    token: str = Field(repr=False)
    epoch: int
    expires_at: datetime


_DURABLE_ON = (
    "Where all of the tokens are: node, on the drive of one node; shared, in the shared store, which outlives that. "
    "Null where there are none."
)


class StoredKv(BaseModel):
    state: KvState
    tokens: int = Field(description="Tokens from the head of the session that can be restored.")
    pages: int
    bytes: int
    durable_on: Durability | None = Field(default=None, description=_DURABLE_ON)
    reason: str | None = Field(default=None, description="Why it is not going to be durable where that was asked for.")


class Suspended(BaseModel):
    model_config = _example(
        {
            "id": _SESSION["id"],
            "status": "suspended",
            "revision": "13",
            "head_id": _ENTRY["id"],
            "pending_tool_calls": ["call_1"],
            "operation": None,
            "kv": {"state": "durable", "tokens": 18432, "pages": 288, "bytes": 424673280, "durable_on": "node"},
        }
    )

    id: str
    status: SessionStatus
    revision: str
    head_id: str | None
    pending_tool_calls: list[str]
    operation: str | None = Field(description="The flush or demotion to follow, if one is in progress.")
    kv: StoredKv


class EngineLink(BaseModel):
    """The arguments that an OpenAI client needs for the session's next call to the engine."""

    base_url: str
    extra_body: dict[str, str]
    dp_rank: int | None = Field(
        default=None,
        description="The DP rank of the engine that the session goes to, which `session_id` names to it; null where it "
        "has only one.",
    )


class Outlook(BaseModel):
    state: KvState
    tokens: int
    valid: bool = Field(description="Whether the engine can use the stored pages; if not, it recomputes.")
    invalid_reason: str | None
    upper_bound: bool = Field(
        default=False, description="Whether tokens is an upper bound: after a fork or rewind, until the next turn."
    )
    durable_on: Durability | None = Field(default=None, description=_DURABLE_ON)
    prefetch: str | None = Field(default=None, description="The operation that brings the pages back, if asked for.")


class Resumed(BaseModel):
    model_config = _example(
        {
            "session": _SESSION,
            "lease": _LEASE,
            "entries": _ENTRIES,
            "pending_tool_calls": [],
            "engine": {
                "base_url": "http://127.0.0.1:30000/v1",
                "extra_body": {"session_id": f"{_SESSION['id']}.AQAAAAAAAAAMxSOO9Sy2kz3Z7yJkqxM5cHRlbmFudCBkZWZhdWx0"},
            },
            "kv": {
                "state": "durable",
                "tokens": 18432,
                "valid": True,
                "invalid_reason": None,
                "upper_bound": False,
                "durable_on": "node",
                "prefetch": None,
            },
        }
    )

    session: Session
    lease: Lease
    entries: EntryList
    pending_tool_calls: list[str] = Field(description="Calls without a result, in the order of their claims.")
    engine: EngineLink | None = Field(description="Null while no live engine serves the session's model.")
    kv: Outlook


class Operation(BaseModel):
    model_config = _example(
        {
            "id": "op_01k8z3w0a7s5d3f1g9h7j5k3m1",
            "kind": "flush",
            "session_id": _SESSION["id"],
            "state": "done",
            "result": {
                "state": "durable",
                "tokens": 18432,
                "pages": 288,
                "bytes": 424673280,
                "durable_on": "node",
            },
            "created_at": "2026-01-05T09:31:13Z",
            "finished_at": "2026-01-05T09:31:15.250000Z",
            "seconds": 2.25,
        }
    )

    id: str
    kind: str
    session_id: str
    state: OperationState
    result: dict[str, Any] | None = Field(
        description="The outcome: state, tokens, pages, bytes and, of a flush, durable_on; or error."
    )
    created_at: datetime
    finished_at: datetime | None
    seconds: float | None = Field(default=None, description="From its start to its end.")


class Signalled(BaseModel):
    model_config = _example({"session_id": _SESSION["id"], "state": "accepted"})

    session_id: str
    state: Literal["accepted", "ignored"] = Field(
        description="ignored: the session is being run, no live engine has had it, or foresight is off."
    )


class KvTier(BaseModel):
    tokens: int = Field(description="Tokens from the head of the session that are there, on every rank.")
    bytes: int = Field(description="Their bytes, of all ranks.")


class Wait(BaseModel):
    """What a session waits for between its turns, as its engine knows it."""

    state: Literal["waits", "served", "released"] = Field(
        description="served: a request of it is queued or runs; released: nobody is expected back."
    )
    kind: str = Field(default="", description="tool, person or other; empty where nobody has said.")
    waited_s: float = Field(description="Since its last request ended, or the one that is served was queued.")
    rest_p50_s: float | None = Field(
        default=None, description="It is back this soon with a probability of one half. Null: never, or not known."
    )
    rest_p90_s: float | None = Field(default=None, description="It is back this soon in nine of ten such waits.")


class Fetch(BaseModel):
    """The last time that the session's KV was brought to the device before a request."""

    ago_s: float
    index: float
    displaced: float = Field(description="The largest index of what had to leave the device for it.")
    tokens: int
    outcome: str = Field(
        description="under way; there; used: the next request found it; late: that came before it; wasted: it failed, "
        "or left the device unused."
    )
    reason: str = Field(
        default="",
        description="Of one that was wasted. left: it went although its request was still expected; wrong: that should "
        "have come by then, or was not expected any more; cancelled: it came to nothing.",
    )


class Decision(BaseModel):
    """What an engine has decided about a session, or what became of that."""

    id: str
    at: datetime
    session_id: str
    decision: str = Field(description="fetch, demote, evict, release or foresee.")
    outcome: str = Field(
        description="Of a fetch: begun, there, used, late, left, wrong, cancelled. Of a demotion: begun, copied, "
        "failed. Of an eviction: waited_for. Of a release: accepted, ignored. Of a forecast: ignored."
    )
    tokens: int = Field(description="How many tokens of its context that is about.")
    index: float | None = Field(description="What a byte of it was worth on the device then, per second.")
    displaced: float | None = Field(description="Of a fetch: the largest index of what had to leave for it.")


class Restore(BaseModel):
    """That a session's pages were restored to the device."""

    at: datetime = Field(description="When that had ended.")
    why: str = Field(
        description="request: under its request's forward; queued: for a queued one, before its forward; prefetch: "
        "before there was one."
    )
    tokens: dict[str, int] = Field(
        description="How many came from the host tier (host), the drive (nvme) and the shared store (shared)."
    )
    bytes: int = Field(description="As they were read, on the engine's first rank.")
    seconds: float = Field(description="From begin to end, with what else was restored in the same batch.")
    waited_s: float = Field(description="How long of that a forward waited for pages.")


class PagesPart(BaseModel):
    """Tokens of a session's context that follow each other and are in the same places."""

    first: int = Field(description="The number of its first token, from 0.")
    tokens: int
    device: bool
    host: bool
    extent: str | None = Field(description="The file on the drive that they are read from; null: they are not there.")
    shared_extent: str | None = Field(description="The extent in the shared store; null: they are not there.")


class AccountTier(BaseModel):
    bytes: int | None = Field(description="What the account has there, on the rank that answers; null where unknown.")
    limit: int | None = Field(description="What it may have there before it gives first; null: no limit.")


class Account(BaseModel):
    """Whom a session's KV is charged to."""

    name: str = Field(description="The tenant, or its KV group; none if the engine knows no turn.")
    tiers: dict[Literal["device", "host", "nvme"], AccountTier]


class HeldUntil(BaseModel):
    tier: Literal["device", "host", "nvme"]
    rest_s: float = Field(description="The pin expires this soon.")


class Placement(BaseModel):
    """Where a session's KV is, what it waits for, and why it is there."""

    model_config = _example(
        {
            "session_id": _SESSION["id"],
            "engine": "eng_1",
            "tiers": {
                "device": {"tokens": 18432, "bytes": 424673280},
                "host": {"tokens": 0, "bytes": 0},
                "disk": {"tokens": 18432, "bytes": 424673280},
            },
            "wait": {
                "state": "waits",
                "kind": "tool",
                "waited_s": 4.2,
                "rest_p50_s": 3.1,
                "rest_p90_s": 11.8,
            },
            "index": 0.21,
            "place": 3,
            "fetch": None,
            "decisions": [_DECISION],
            "restores": [
                {
                    "at": "2026-01-05T09:31:12.512000Z",
                    "why": "request",
                    "tokens": {"nvme": 18432},
                    "bytes": 424673280,
                    "seconds": 0.19,
                    "waited_s": 0.02,
                }
            ],
            "page_map": [
                {
                    "first": 0,
                    "tokens": 18432,
                    "device": True,
                    "host": False,
                    "extent": "000000000000002a.ext",
                    "shared_extent": None,
                }
            ],
            "more_tokens": 0,
            "durable_on": "node",
            "next": "leaves the device after 61,440 tokens of others",
        }
    )

    session_id: str
    engine: str | None = Field(description="The engine that was asked; null if none that is live has the session.")
    tiers: dict[Literal["device", "host", "disk"], KvTier] = Field(description="Empty where no engine answers.")
    wait: Wait | None = Field(default=None, description="Null if none of its requests has ended on that engine lately.")
    index: float | None = Field(
        default=None, description="What a byte of it is worth on the device, per second; the least leaves first."
    )
    place: int | None = Field(default=None, description="Its place among the contexts on the device: 1 leaves last.")
    fetch: Fetch | None = None
    decisions: list[Decision] = Field(
        default_factory=list, description="What was decided about it lately, and what became of that; the newest last."
    )
    restores: list[Restore] = Field(
        default_factory=list, description="What was restored of it lately, at most 20; the newest last."
    )
    page_map: list[PagesPart] = Field(
        default_factory=list, description="Where its tokens are on the engine's first rank, at most 256 parts."
    )
    more_tokens: int = Field(default=0, description="Tokens beyond these parts.")
    pin: HeldUntil | None = Field(default=None, description="Null if it is not pinned.")
    left_tokens: int = Field(
        default=0, description="Tokens on the device that its last turns have left: they are the first to leave."
    )
    account: Account | None = Field(default=None, description="Null from an engine of an earlier release.")
    durable_on: Durability | None = Field(
        default=None,
        description="Where what can be restored of it is stored: node, on the drive of one node; shared, all of it in "
        "the shared store. Null where nothing is.",
    )
    next: str = Field(default="", description="What would move it, in words.")


class Pinned(BaseModel):
    """That a session's KV stays on a tier."""

    model_config = _example(
        {
            "session_id": _SESSION["id"],
            "state": "accepted",
            "tier": "device",
            "expires_at": "2026-01-05T11:31:13Z",
            "tokens": 18432,
            "bytes": 424673280,
        }
    )

    session_id: str
    state: Literal["accepted", "clipped", "pending", "ignored"] = Field(
        description="clipped: for less time, on a lower tier, or less of it on the drive; pending: its engine takes "
        "note with its next heartbeat; ignored: too much is pinned, or its engine cannot pin."
    )
    tier: Literal["device", "host", "nvme"] = Field(description="The tier on which it stays.")
    expires_at: datetime
    tokens: int = Field(default=0, description="Tokens from the session's head that are pinned, on every rank.")
    bytes: int = Field(default=0, description="Their bytes, of all ranks.")


class ToolCall(BaseModel):
    model_config = _example(
        {
            "id": "call_1",
            "session_id": _SESSION["id"],
            "name": "read_file",
            "state": "claimed",
            "expected_s": 0.5,
            "typical_s": 0.42,
            "claimed_at": "2026-01-05T09:31:13Z",
            "finished_at": None,
            "result": None,
            "revision": "13",
        }
    )

    id: str
    session_id: str
    name: str
    state: ToolCallState
    expected_s: float | None = Field(description="The claimant's estimate.")
    typical_s: float | None = Field(description="The median duration of the tool's earlier calls.")
    claimed_at: datetime
    finished_at: datetime | None
    result: dict[str, Any] | None = Field(
        description="Its output or error, if the claimed call has one; not repeated to the caller that reports it."
    )
    revision: str


class Engine(BaseModel):
    id: str
    node: str
    rank: int
    base_url: str
    model: str
    fingerprint: str
    pages_dir: str
    shared_store: str = Field(default="", description="The URL of the store that it shares with others; empty: none.")
    reads: list[str] = Field(default=[], description="The other nodes of its machine whose pages it can restore too.")
    dp_rank: int = Field(default=0, description="Its DP rank; `rank` is its number within that one.")
    dp_size: int = Field(default=1, description="How many DP ranks its server has.")
    phase: Phase = Field(
        default=Phase.BOTH,
        description="What it does of a request where prefill and decode are apart: `prefill` or `decode`; empty: both.",
    )
    live: bool
    started_at: datetime
    heartbeat_at: datetime


class SessionCounts(BaseModel):
    """How many sessions there are. Counting ends: 10,001 means more than 10,000, and 1,001 of ``lapsed`` more than
    1,000."""

    all: int
    running: int = Field(description="A turn of theirs runs.")
    lapsed: int = Field(description="A turn ran until its lease lapsed, and nobody has resumed them since.")


class Held(BaseModel):
    """What an account has on a tier."""

    bytes: int | None = Field(description="On all engines that answer; null where none says.")
    limit: int | None = Field(description="What it may have there on one engine; null: no limit.")


class EngineOverview(BaseModel):
    """An engine: all ranks that answer under one base URL."""

    id: str = Field(description="The id of its first rank.")
    base_url: str
    model: str
    ranks: int
    live: bool = Field(description="Whether all ranks send heartbeats.")
    off: str | None = Field(description="Why it stores nothing; null if it does.")
    silent: str | None = Field(description="Why it does not answer; null if it does.")
    stored_bytes: int | None = Field(description="Its page stores, of all tenants. Null but for administrators.")
    restores_per_s: float | None = Field(description="Since the snapshot before. Null but for administrators.")
    restored_bytes_per_s: float | None = Field(description="Since the snapshot before. Null but for administrators.")


class TenantOverview(BaseModel):
    id: str
    kv_group: str | None = Field(description="The group that its KV is charged to; null: it is charged itself.")
    sessions: int = Field(description="1,001 means more than 1,000.")
    session_limit: int | None = Field(description="How many it may have; null: no limit.")
    tiers: dict[Literal["device", "host", "nvme"], Held] = Field(description="Of the account it is charged to.")


class Overview(BaseModel):
    """What there is and what is wrong, as of one moment."""

    model_config = _example(
        {
            "taken_at": "2026-01-05T09:31:13Z",
            "tenant": "acme",
            "sessions": {"all": 214, "running": 3, "lapsed": 0},
            "tiers": {
                "device": {"bytes": 424673280, "limit": None},
                "host": {"bytes": 0, "limit": None},
                "nvme": {"bytes": 8589934592, "limit": 10737418240},
            },
            "engines": [
                {
                    "id": "eng_1",
                    "base_url": "http://127.0.0.1:30000/v1",
                    "model": "smollm2",
                    "ranks": 1,
                    "live": True,
                    "off": None,
                    "silent": None,
                    "stored_bytes": 8589934592,
                    "restores_per_s": 1.5,
                    "restored_bytes_per_s": 636e6,
                }
            ],
            "prompt_tokens": {"device": 51200, "fetched": 18432, "host": 0, "nvme": 18432, "recomputed": 9216},
            "alarms": [],
            "tenants": None,
            "more_tenants": False,
        }
    )

    taken_at: datetime = Field(description="By the database's clock. A snapshot is at most ten seconds old.")
    tenant: str = Field(description="The caller's.")
    sessions: SessionCounts
    tiers: dict[Literal["device", "host", "nvme"], Held] = Field(description="Of the caller's account.")
    engines: list[EngineOverview]
    prompt_tokens: dict[str, int] | None = Field(
        description="Tokens of prompts since the engines started, by where they came from: device, fetched, host, "
        "nvme, recomputed. Of all tenants: null but for administrators."
    )
    alarms: list[str] = Field(description="What is wrong, in sentences that say what to do.")
    tenants: list[TenantOverview] | None = Field(description="By name, at most 50. Null but for administrators.")
    more_tenants: bool = Field(description="Whether there are more tenants than those.")


class SessionOverview(BaseModel):
    id: str
    model: str
    state: Literal["running", "lapsed", "suspended", "idle"] = Field(
        description="lapsed: a turn ran until its lease lapsed; suspended: between turns; idle: before the first."
    )
    turned_at: datetime = Field(description="When its newest turn ended, or it was made.")
    waits_for: str | None = Field(description="What a suspended one waits for, as its suspend has said.")
    open_calls: int = Field(description="Tool calls without a result.")
    tokens: int = Field(description="Tokens from its head that are stored on a node.")
    bytes: int = Field(description="Their bytes, on all nodes and ranks.")
    expires_at: datetime | None


class SessionOverviewList(BaseModel):
    model_config = _example(
        {
            "object": "list",
            "data": [
                {
                    "id": _SESSION["id"],
                    "model": "smollm2",
                    "state": "suspended",
                    "turned_at": "2026-01-05T09:31:12.512000Z",
                    "waits_for": "tool",
                    "open_calls": 1,
                    "tokens": 18432,
                    "bytes": 424673280,
                    "expires_at": None,
                }
            ],
            "next": None,
        }
    )

    object: Literal["list"] = "list"
    data: list[SessionOverview]
    next: str | None = Field(description="Goes on after this list, as `after`; null at the end.")


class DecisionList(BaseModel):
    model_config = _example(
        {
            "object": "list",
            "data": [_DECISION],
            "first_id": _DECISION["id"],
            "last_id": _DECISION["id"],
            "has_more": False,
            "silent": None,
        }
    )

    object: Literal["list"] = "list"
    data: list[Decision]
    first_id: str | None
    last_id: str | None
    has_more: bool
    silent: str | None = Field(description="Why the engine does not say what it has decided; null if it does.")


class EngineList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Engine]
    first_id: str | None
    last_id: str | None
    has_more: Literal[False] = False
