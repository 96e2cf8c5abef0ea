"""What each action is on the command line: whoever learns it here can do it there."""

from __future__ import annotations

import shlex


def _line(*words: str) -> str:
    return shlex.join(["agentstate", *words])


def prefetch(session_id: str, tier: str) -> str:
    return _line("sessions", "prefetch", session_id, "--tier", tier)


def demote(session_id: str) -> str:
    return _line("sessions", "demote", session_id)


def pin(session_id: str, tier: str, lasting: str) -> str:
    return _line("sessions", "pin", session_id, "--tier", tier, "--for", lasting)


def unpin(session_id: str) -> str:
    return _line("sessions", "unpin", session_id)


def fork(session_id: str, at: str | None) -> str:
    return _line("sessions", "fork", session_id, *(() if at is None else ("--at", at)))


def rewind(session_id: str, at: str | None) -> str:
    return _line("sessions", "rewind", session_id, "--to", at or "start")


def export(session_id: str) -> str:
    return _line("sessions", "export", session_id)


def delete(session_id: str) -> str:
    return _line("sessions", "rm", session_id)


def create_key(tenant: str, role: str) -> str:
    return _line("keys", "create", "--tenant", tenant, "--role", role)


def revoke_key(key_id: str) -> str:
    return _line("keys", "revoke", key_id)
