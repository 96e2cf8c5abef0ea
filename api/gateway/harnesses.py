"""Who a request says it is, and what of it must not reach an engine.

What a harness says about itself names a conversation; it never is a right to one. Ids are those of one tenant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from agentstate.api.gateway import documents

_ID = re.compile(r"(?! )[\x20-\x7e]{1,200}(?<! )")
_VENDOR = re.compile(rb"x-([a-z0-9]{1,40})-session-id")
_OLD_CLAUDE_CODE_USER = re.compile(r"user_.*_session_([0-9a-fA-F-]{36})")
_PI = re.compile(rb"pi[ /(]")
# A cache key names a prefix that many share, unless the Agents SDK makes it of a conversation. A run is less than one.
_AGENTS_SDK_KEY = re.compile(r"agents-sdk:(?:conversation|session):[\x21-\x7e]+")
# Claude Code's: names and values without spaces, so that a prompt that follows on the same line is no part of it.
# The bound on their number is one on the memory that matching takes.
_BILLING = re.compile(r"\s*x-anthropic-billing-header:[ \t]*(?:[\w.-]+=[^;\s]*(?:;|(?=\s|\Z))[ \t]*){1,100}\s*")


@dataclass(frozen=True)
class Identity:
    """Who a request says it is.

    ``session`` was named to us. ``harness`` is the conversation's name in a harness that is known, behind the harness's
    own: ``codex:<thread>``; ``parent`` is that of the conversation which began it. ``kind`` is ``turn``, or what else
    the harness says the request is, such as ``compaction``.
    """

    session: str | None = None
    harness: str | None = None
    parent: str | None = None
    kind: str = "turn"


@dataclass(frozen=True)
class Reserved:
    """What only the gateway may say to an engine. Names of headers are in lower case."""

    fields: frozenset[str]
    field_prefixes: tuple[str, ...]
    headers: frozenset[bytes]
    header_prefixes: tuple[bytes, ...]

    def field(self, name: str) -> bool:
        return name in self.fields or name.startswith(self.field_prefixes)

    def header(self, name: bytes) -> bool:
        return name in self.headers or name.startswith(self.header_prefixes)


RESERVED = Reserved(
    fields=frozenset(
        {
            "session_id",
            "session_params",
            "cache_salt",
            "extra_key",
            "rid",
            "request_id",
            "routed_dp_rank",
            "data_parallel_rank",
            "disagg_prefill_dp_rank",
            "kv_hints",
        }
    ),
    field_prefixes=("bootstrap_",),
    headers=frozenset({b"x-data-parallel-rank", b"x-body-compressed"}),
    header_prefixes=(b"x-override-", b"x-smg-"),
)


def identify(headers: Mapping[bytes, bytes], body: dict[str, Any]) -> Identity:
    """Who a request says it is; to be asked before `sanitize`. Names of headers are in lower case.

    A harness's id of more than 200 characters, or with others than printable ASCII, is ignored. The session that is
    named to us, in a header percent-encoded as answers have it, is taken as it is, for whoever looks for it to refuse;
    ValueError is raised if it is no text.
    """
    session = unquote(_text(headers.get(b"x-agentstate-session", b""))) or body.get("session_id")
    if not isinstance(session, str | None):
        raise ValueError("session_id must be a text")
    found = _Request(headers, body).found()
    return Identity(session or None, found.harness, found.parent if found.parent != found.harness else None, found.kind)


def strip_volatile(body: dict[str, Any]) -> bool:
    """Takes out of ``body`` what a harness writes anew at the head of every prompt; whether there was any.

    That is Claude Code's billing line, with which no two requests would have a page in common.
    """
    stripped = False
    system, changed = _without_billing(body.get("system"))
    if changed:
        stripped = True
        if system:
            body["system"] = system
        else:
            del body["system"]
    messages = body.get("messages")
    if not isinstance(messages, list):
        return stripped
    kept: list[Any] = []  # of the messages that it begins with
    read = 0
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("system", "developer"):
            break
        read += 1
        content, changed = _without_billing(message.get("content"))
        stripped |= changed
        if content or not changed:
            kept.append({**message, "content": content} if changed else message)
    messages[:read] = kept
    return stripped


def sanitize(body: dict[str, Any]) -> bool:
    """Takes out of ``body`` the fields that only the gateway may send; whether there were any."""
    found = [name for name in body if RESERVED.field(name)]
    for name in found:
        del body[name]
    return bool(found)


def _without_billing(content: Any) -> tuple[Any, bool]:
    """A content without billing lines at its head, and whether there was one."""
    if isinstance(content, str):
        behind = _behind_billing(content)
        return behind, behind != content
    if not isinstance(content, list):
        return content, False
    for number, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) else None
        rest = _behind_billing(text) if isinstance(text, str) else None
        if rest is None or rest == text:
            return content[number:], number > 0
        if rest:
            return [{**part, "text": rest}, *content[number + 1 :]], True
    return [], bool(content)


def _behind_billing(text: str) -> str:
    end = 0
    while line := _BILLING.match(text, end):
        end = line.end()
    return text[end:]


class _Request:
    """What a request says about the harness that it comes from."""

    def __init__(self, headers: Mapping[bytes, bytes], body: dict[str, Any]):
        self._headers = headers
        self._body = body

    def found(self) -> Identity:
        """The first that is known, the most explicit first."""
        for find in (
            self._dynamo,
            self._claude_code,
            self._codex,
            self._deepseek,
            self._opencode,
            self._litellm,
            self._vendor,
            self._pi,
            self._agents_sdk,
        ):
            if found := find():
                return found
        return Identity()

    def _dynamo(self) -> Identity | None:
        return _named("dynamo", self._header("x-dynamo-session-id"), self._header("x-dynamo-parent-session-id"))

    def _claude_code(self) -> Identity | None:
        session = self._header("x-claude-code-session-id") or self._claude_code_user()
        agent = self._header("x-claude-code-agent-id")
        if session is None or (agent is None and b"x-claude-code-agent-id" in self._headers):
            # An agent whose name cannot be used must not pass for the session that it works for.
            return None
        if agent is None:
            return _named("claude-code", session)
        parent = self._header("x-claude-code-parent-agent-id")
        return _named("claude-code", f"{session}:{agent}", f"{session}:{parent}" if parent else session)

    def _claude_code_user(self) -> str | None:
        """The session in the body, where older releases have it alone: as JSON, or at the end of a name."""
        user = _member(self._body.get("metadata"), "user_id")
        if not isinstance(user, str):
            return None
        old = _OLD_CLAUDE_CODE_USER.fullmatch(user)
        return old[1] if old else _id(_member(_parsed(user), "session_id"))

    def _codex(self) -> Identity | None:
        """By the thread: threads that were begun by another share its session and its cache key."""
        told = self._body.get("client_metadata")
        thread = self._header("thread-id") or _id(_member(told, "thread_id"))
        agent = self._headers.get(b"originator") or self._headers.get(b"user-agent", b"")
        if thread is None and agent.lower().startswith(b"codex"):
            thread = self._header("session_id")
        parent = self._header("x-codex-parent-thread-id") or _id(_member(told, "x-codex-parent-thread-id"))
        for turn in (_member(told, "x-codex-turn-metadata"), self._headers.get(b"x-codex-turn-metadata")):
            if kind := _id(_member(_parsed(turn), "request_kind")):
                return _named("codex", thread, parent, kind)
        return _named("codex", thread, parent)

    def _deepseek(self) -> Identity | None:
        kind = "compaction" if self._header("x-deepseek-harness-compact") == "1" else "turn"
        session = self._header("x-deepseek-harness-session-id")
        return _named("deepseek", session, self._header("x-deepseek-harness-parent-session-id"), kind)

    def _opencode(self) -> Identity | None:
        session = self._header("x-session-id") or self._header("x-opencode-session")
        return _named("opencode", session, self._header("x-parent-session-id"))

    def _litellm(self) -> Identity | None:
        return _named("litellm", self._header("x-litellm-session-id") or self._header("x-litellm-trace-id"))

    def _vendor(self) -> Identity | None:
        """Those that name the header after themselves, as forks of Roo do."""
        for name in self._headers:
            vendor = _VENDOR.fullmatch(name)
            if vendor and vendor[1] != b"parent" and (session := self._header(name.decode())):
                return _named(vendor[1].decode(), session)
        return None

    def _pi(self) -> Identity | None:
        session = self._header("x-session-affinity")
        if session is None and self._header("session_id") == self._header("x-client-request-id"):
            session = self._header("session_id")
        if session is None and _PI.match(self._headers.get(b"user-agent", b"")):
            session = _id(self._body.get("prompt_cache_key"))
        return _named("pi", session)

    def _agents_sdk(self) -> Identity | None:
        key = _id(self._body.get("prompt_cache_key"))
        return Identity(harness=key) if key and _AGENTS_SDK_KEY.fullmatch(key) else None

    def _header(self, name: str) -> str | None:
        return _id(self._headers.get(name.encode(), b"").decode("latin-1").strip())


def _text(header: bytes) -> str:
    """A header's value. It should be ASCII; some clients send UTF-8."""
    try:
        return header.decode().strip()
    except UnicodeDecodeError:
        return header.decode("latin-1").strip()


def _named(harness: str, conversation: str | None, parent: str | None = None, kind: str = "turn") -> Identity | None:
    if conversation is None:
        return None
    return Identity(None, f"{harness}:{conversation}", f"{harness}:{parent}" if parent else None, kind)


def _id(value: Any) -> str | None:
    return value if isinstance(value, str) and _ID.fullmatch(value) else None


def _member(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _parsed(value: Any) -> Any:
    try:
        return documents.loads(value) if isinstance(value, str | bytes) else None
    except ValueError:
        return None
