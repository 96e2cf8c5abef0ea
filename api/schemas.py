"""Request bodies. Unknown fields are refused: a misspelt option must not be silently ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from agentstate import ids
from agentstate.api.paths import decoded
from agentstate.errors import InvalidId
from agentstate.fleet.operations import Tier
from agentstate.fleet.pins import PinTier
from agentstate.fleet.waits import Activity
from agentstate.sessions.outcomes import SuspendReason
from agentstate.sql.models import EntryKind

MAX_ENTRIES = 1000
MAX_TAIL = 1000
MAX_LIST = 1000
MAX_TTL_S = 24 * 3600
MAX_EXPIRY_S = 10 * 365 * 24 * 3600
MAX_DURABLE_TIMEOUT_MS = 60_000
MAX_BUSY_TIMEOUT_MS = 30_000
MAX_PREFETCH_MS = 120_000
# Exclusive: below it the numbers of JavaScript, and of most JSON parsers, are exact.
MAX_NUMBER = 2**53

# PostgreSQL stores no NUL character in a text.
Name = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00]+$")]


def _id(value: str) -> str:
    try:
        return ids.check(value)
    except InvalidId as error:
        raise ValueError(str(error)) from None


# A caller's id of a session or a tool call, in a body and in a path.
Id = Annotated[str, StringConstraints(min_length=1, max_length=ids.MAX_BYTES, pattern=ids.PATTERN), AfterValidator(_id)]
PathId = Annotated[Id, BeforeValidator(decoded)]


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number is expected")
    try:
        float(value)
    except OverflowError:
        raise ValueError("the number is too large") from None
    return value


# Pydantic accepts true and "1" as 1; a document that says number means a number.
Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
ExpiryS = Annotated[Float, Field(gt=0, le=MAX_EXPIRY_S, description="Seconds from now.")]
TtlS = Annotated[Float, Field(gt=0, le=MAX_TTL_S, description="The default is the service's lease_ttl_s.")]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _example(**example: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [example]})


class CreateSession(Body):
    model_config = _example(model="smollm2", metadata={"user": "u_17"}, expires_in_s=86400)

    model: Name = Field(description="The name under which an engine serves the model.")
    id: Id | None = Field(default=None, description="An id of the caller's own.")
    metadata: dict[str, Any] = Field(default_factory=dict)
    expires_in_s: ExpiryS | None = None
    cache_salt: Name | None = Field(default=None, description="Sessions with different salts share no pages.")
    extra_key: Name | None = Field(default=None, description="A second name that separates pages, like cache_salt.")


class UpdateSession(Body):
    model_config = _example(metadata={"user": "u_17", "draft": None}, expires_in_s=86400)

    metadata: dict[str, Any] | None = Field(default=None, description="The keys to change; null removes a key.")
    expires_in_s: ExpiryS | None = Field(default=None, description="Seconds from now; null: it does not expire.")


class LeaseProof(Body):
    token: str = Field(min_length=1, max_length=256, repr=False)
    epoch: Int = Field(ge=1, lt=MAX_NUMBER)


class NewEntry(Body):
    kind: EntryKind
    payload: dict[str, Any] = Field(
        description=(
            "A tool call has name, and may have arguments and expected_s; a tool result has either output or error; "
            "other payloads are the caller's own."
        )
    )
    call_id: Id | None = Field(default=None, description="Of a tool call and its result.")


class AppendEntries(Body):
    model_config = _example(
        lease={"token": "q0vT3…", "epoch": 8},
        entries=[
            {"kind": "message", "payload": {"role": "user", "content": "What is in the report?"}},
            {
                "kind": "tool_call",
                "call_id": "call_1",
                "payload": {"name": "read_file", "arguments": {"path": "report.md"}, "expected_s": 0.5},
            },
            {"kind": "tool_result", "call_id": "call_1", "payload": {"output": "Sales grew."}},
        ],
    )

    lease: LeaseProof
    entries: list[NewEntry] = Field(min_length=1, max_length=MAX_ENTRIES)


class SuspendSession(Body):
    model_config = _example(
        lease={"token": "q0vT3…", "epoch": 8}, reason="user_wait", kv="retain", durable_timeout_ms=500
    )

    lease: LeaseProof
    reason: SuspendReason
    kv: Literal["retain", "demote", "release"] = Field(
        default="retain",
        description=(
            "retain: the KV stays on the device while there is room; demote: it is the first to be evicted there once "
            "it is durable; release: the KV is no longer needed, what is stored of it is erased, and the service waits "
            "for nothing."
        ),
    )
    durability: Literal["node", "shared"] = Field(
        default="node",
        description=(
            "Where the KV has to be before it is durable: on the drive of its node, or all of it in the shared store, "
            "from where other nodes restore it."
        ),
    )
    durable_timeout_ms: Int = Field(
        default=500, ge=0, le=MAX_DURABLE_TIMEOUT_MS, description="How long to wait for the KV to be durable."
    )
    expires_in_s: ExpiryS | None = Field(default=None, description="Replaces the session's expiry.")


class Expectation(Body):
    model: Name


class ResumeSession(Body):
    model_config = _example(lease_ttl_s=60, on_busy="reject", tail=50, prefetch="none", expect={"model": "smollm2"})

    lease_ttl_s: TtlS | None = None
    on_busy: Literal["reject", "wait"] = "reject"
    busy_timeout_ms: Int = Field(
        default=10_000, ge=0, le=MAX_BUSY_TIMEOUT_MS, description="With on_busy wait: how long to wait for the lease."
    )
    tail: Int = Field(default=50, ge=0, le=MAX_TAIL, description="How many of the newest entries to return.")
    prefetch: Literal["none", "host", "device"] = Field(
        default="none", description="Where to bring the pages back to; the answer does not wait for it."
    )
    expect: Expectation | None = Field(default=None, description="Refuse (412) if the session differs.")


class RenewLease(Body):
    model_config = _example(lease={"token": "q0vT3…", "epoch": 8}, lease_ttl_s=60)

    lease: LeaseProof
    lease_ttl_s: TtlS | None = None


class ForkSession(Body):
    model_config = _example(at="ent_01k8z3vb1r9d0c3f6h8j2k4m5n", metadata={"branch": "b"})

    at: Name | None = Field(default=None, description="The last entry to share; the head if not given.")
    id: Id | None = Field(default=None, description="An id of the caller's own.")
    metadata: dict[str, Any] | None = Field(default=None, description="The parent's if not given.")
    expires_in_s: ExpiryS | None = None


class RewindSession(Body):
    model_config = _example(at="ent_01k8z3vb1r9d0c3f6h8j2k4m5n")

    at: Name | None = Field(description="The entry that becomes the head; null: the start.")
    lease: LeaseProof | None = Field(default=None, description="Needed while the session is being run.")


class PrefetchPages(Body):
    model_config = _example(tier="host", due_ms=1500, deadline_ms=2000)

    tier: Tier = Tier.HOST
    due_ms: Int | None = Field(
        default=None,
        ge=0,
        le=MAX_PREFETCH_MS,
        description="When the pages are needed: what is needed sooner is read before them. The default is at once.",
    )
    deadline_ms: Int | None = Field(
        default=None, ge=1, le=MAX_PREFETCH_MS, description="Fail after this time, when the pages are no longer useful."
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.due_ms is not None and self.deadline_ms is not None and self.due_ms > self.deadline_ms:
            raise ValueError("the pages are due after the deadline, when they are no longer useful")
        return self


class Signal(Body):
    model_config = _example(kind="typing")

    kind: Activity = Field(description="typing: a person writes the next message; opened: a person reads the session.")


class PinKv(Body):
    model_config = _example(tier="device", ttl_s=7200)

    tier: PinTier = Field(default=PinTier.DEVICE, description="What stays on a tier stays on those below it, too.")
    ttl_s: Float = Field(gt=0, le=MAX_EXPIRY_S, description="For how long; cut to the service's pin_max_s.")


class ClaimToolCall(Body):
    model_config = _example(
        lease={"token": "q0vT3…", "epoch": 8}, name="read_file", arguments={"path": "report.md"}, expected_s=0.5
    )

    name: Name
    arguments: Any = None
    expected_s: Float | None = Field(default=None, ge=0, description="Its expected duration.")
    lease: LeaseProof | None = Field(default=None, description="Needed while the session is being run.")


class FinishToolCall(Body):
    """Has either output or error."""

    model_config = _example(lease={"token": "q0vT3…", "epoch": 8}, output="Sales grew.")

    output: Any = None
    error: Any = None
    lease: LeaseProof | None = Field(default=None, description="Needed while the session is being run.")
