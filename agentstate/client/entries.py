"""Builders of entries to append, in the API's form."""

from __future__ import annotations

from typing import Any

from agentstate import documents
from agentstate.sql.models import EntryKind


def message(payload: dict[str, Any]) -> dict[str, Any]:
    """A message of the conversation, in the caller's own form."""
    return {"kind": EntryKind.MESSAGE, "payload": payload}


def note(payload: dict[str, Any]) -> dict[str, Any]:
    """Data to keep with the session outside the conversation."""
    return {"kind": EntryKind.NOTE, "payload": payload}


def tool_call(call_id: str, name: str, arguments: Any = None, *, expected_s: float | None = None) -> dict[str, Any]:
    """The claim of a tool call. Append it **before** the tool runs."""
    payload = {"name": name, "arguments": arguments}
    if expected_s is not None:
        payload["expected_s"] = expected_s
    return {"kind": EntryKind.TOOL_CALL, "call_id": call_id, "payload": payload}


def tool_output(call_id: str, output: Any) -> dict[str, Any]:
    """The output of a tool call. Numbers that JSON cannot express are stored by name: ``NaN``, ``Infinity``."""
    return {"kind": EntryKind.TOOL_RESULT, "call_id": call_id, "payload": {"output": documents.finite(output)}}


def tool_error(call_id: str, error: Any) -> dict[str, Any]:
    """The error of a failed tool call."""
    return {"kind": EntryKind.TOOL_RESULT, "call_id": call_id, "payload": {"error": documents.finite(error)}}
