"""Entries to append, as the API takes them."""

from __future__ import annotations

from typing import Any

from agentstate import documents
from agentstate.sql.models import EntryKind


def message(payload: dict[str, Any]) -> dict[str, Any]:
    """A message of the conversation, in whatever form the caller keeps them."""
    return {"kind": EntryKind.MESSAGE, "payload": payload}


def note(payload: dict[str, Any]) -> dict[str, Any]:
    """Something to remember with the session that is no part of the conversation."""
    return {"kind": EntryKind.NOTE, "payload": payload}


def tool_call(call_id: str, name: str, arguments: Any = None, *, expected_s: float | None = None) -> dict[str, Any]:
    """To append **before** the tool runs: the claim that it is about to."""
    payload = {"name": name, "arguments": arguments}
    if expected_s is not None:
        payload["expected_s"] = expected_s
    return {"kind": EntryKind.TOOL_CALL, "call_id": call_id, "payload": payload}


def tool_output(call_id: str, output: Any) -> dict[str, Any]:
    """What a tool call gave. Of numbers that JSON does not have it keeps the names: ``NaN``, ``Infinity``."""
    return {"kind": EntryKind.TOOL_RESULT, "call_id": call_id, "payload": {"output": documents.finite(output)}}


def tool_error(call_id: str, error: Any) -> dict[str, Any]:
    """Why a tool call failed."""
    return {"kind": EntryKind.TOOL_RESULT, "call_id": call_id, "payload": {"error": documents.finite(error)}}
