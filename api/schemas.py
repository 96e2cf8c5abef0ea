"""The bodies of requests. A field that is not known is refused: a misspelt option must not be silently ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from agentstate.models import EntryKind
from agentstate.sessions import SuspendReason

MAX_ENTRIES = 1000
MAX_TAIL = 1000
MAX_TTL_S = 24 * 3600
MAX_EXPIRY_S = 10 * 365 * 24 * 3600
MAX_DURABLE_TIMEOUT_MS = 60_000

# PostgreSQL stores no NUL character in a text.
Name = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00]+$")]
# An id is part of a path, and of what engines and their logs show.
SessionId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}$")]
ExpiryS = Annotated[float, Field(gt=0, le=MAX_EXPIRY_S, description="Counted from now.")]
TtlS = Annotated[float, Field(gt=0, le=MAX_TTL_S, description="The default is the service's lease_ttl_s.")]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _example(**example: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [example]})


class CreateSession(Body):
    model_config = _example(model="smollm2", metadata={"user": "u_17"}, expires_in_s=86400)

    model: Name = Field(description="The name under which an engine serves it.")
    id: SessionId | None = Field(default=None, description="An id of the caller's own.")
    metadata: dict[str, Any] = Field(default_factory=dict)
    expires_in_s: ExpiryS | None = None
    cache_salt: Name | None = Field(default=None, description="Sessions with different salts share no pages.")
    extra_key: Name | None = Field(default=None, description="As cache_salt: a second name that separates pages.")


class LeaseProof(Body):
    token: str = Field(min_length=1, max_length=256, repr=False)
    epoch: int = Field(ge=1, lt=2**63)


class NewEntry(Body):
    kind: EntryKind
    payload: dict[str, Any] = Field(
        description=(
            "A tool call's holds name and may hold arguments and expected_s; a tool result's holds either output or "
            "error; others are the caller's own."
        )
    )
    call_id: Name | None = Field(default=None, description="Of a tool call and its result.")


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
    kv: Literal["retain"] = "retain"
    durable_timeout_ms: int = Field(
        default=500, ge=0, le=MAX_DURABLE_TIMEOUT_MS, description="How long to wait for the KV to be durable."
    )
    expires_in_s: ExpiryS | None = Field(default=None, description="Replaces the session's expiry.")


class Expectation(Body):
    model: Name


class ResumeSession(Body):
    model_config = _example(lease_ttl_s=60, on_busy="reject", tail=50, expect={"model": "smollm2"})

    lease_ttl_s: TtlS | None = None
    on_busy: Literal["reject"] = "reject"
    tail: int = Field(default=50, ge=0, le=MAX_TAIL, description="How many of the newest entries to give back.")
    expect: Expectation | None = Field(default=None, description="Refuse (412) when the session is not so.")


class RenewLease(Body):
    model_config = _example(lease={"token": "q0vT3…", "epoch": 8}, lease_ttl_s=60)

    lease: LeaseProof
    lease_ttl_s: TtlS | None = None
