"""What a conversation says, whoever says it: messages whose digests are alike when their contents are.

A client that sends back what the model said adds keys, leaves keys out, and writes arguments anew; the message has the
same digest all the same. So the digest covers the canonical content alone: role, text, other parts, tool calls, and
the call that a result is of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from agentstate.api.gateway import documents

TEXTS = frozenset({"text", "input_text", "output_text"})
# What a model thinks is not what it says: most clients do not send it back.
THOUGHTS = frozenset({"thinking", "redacted_thinking", "reasoning", "reasoning_text", "reasoning_content"})
# Keys of parts and items that differ from one request to the next while what is said stays the same.
DECORATIONS = frozenset({"annotations", "cache_control", "id", "index", "logprobs", "status"})

# The largest number to which every integer has a double of its own. JavaScript writes larger ones as doubles.
_LARGEST_EXACT = 2**53


@dataclass(frozen=True)
class Call:
    """A tool call in an assistant's message. ``arguments`` is the text as sent."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """A message of a conversation.

    ``role`` is system (developer is system), user, assistant or tool, or what else the client said. ``digest`` is 16
    bytes of BLAKE2b over the canonical content, ``size`` the characters of its text. ``item`` is the message in its
    API's own form, as the client or the model said it. ``result_of`` is the id of the tool call that this is the result
    of; ``failed`` says that it is marked as an error.
    """

    role: str
    digest: bytes
    size: int
    item: Any
    calls: tuple[Call, ...] = ()
    result_of: str | None = None
    failed: bool = False


def hear(
    role: str,
    content: Any,
    item: Any,
    *,
    calls: Iterable[Call] = (),
    result_of: str | None = None,
    failed: bool = False,
) -> Message:
    """The message with this content: None, a text, or a list of parts in any API's form.

    Raises ValueError where the content is none.
    """
    text, others = _read(content)
    calls = tuple(calls)
    said = hashlib.blake2b(digest_size=16, person=b"heard-1")

    def say(tag: bytes, value: bytes) -> None:
        # With its length in front of it, no content can be mistaken for the beginning of the next.
        said.update(b"%s%d:" % (tag, len(value)))
        said.update(value)

    say(b"role", _utf8(role))
    say(b"text", _utf8(text))
    for other in others:
        say(b"part", other)
    for call in calls:
        say(b"call", _utf8(call.id))
        say(b"name", _utf8(call.name))
        say(b"arguments", _arguments(call.arguments))
    if result_of is not None:
        say(b"result", _utf8(result_of))
    return Message(role, said.digest(), len(text), item, calls, result_of, failed)


def call(call_id: Any, name: Any, arguments: Any) -> Call:
    """A tool call whose arguments are a text or, as some clients send them, an object.

    Raises ValueError where id or name are no texts.
    """
    for value, what in ((call_id, "id"), (name, "name")):
        if not isinstance(value, str | None):
            raise ValueError(f"the {what} of a tool call must be a text")
    if not isinstance(arguments, str):
        arguments = "" if arguments is None else documents.dumps(arguments).decode()
    return Call(call_id or "", name or "", arguments)


def objects(value: Any, what: str) -> list[dict[str, Any]]:
    """``value``, if it is a list of objects. Raises ValueError, which calls it ``what``."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError(f"{what} must be a list of objects")
    return value


def text_or_none(value: Any, what: str) -> str | None:
    """``value``, if it is a text or None. Raises ValueError, which calls it ``what``."""
    if not isinstance(value, str | None):
        raise ValueError(f"{what} must be a text")
    return value


def _read(content: Any) -> tuple[str, list[bytes]]:
    """The canonical text of a content, and its other parts."""
    if content is None or isinstance(content, str):
        return _plain_text(content or ""), []
    texts, others = [], []
    for part in objects([content] if isinstance(content, dict) else content, "content must be a text, or it"):
        kind = part.get("type")
        if not isinstance(kind, str | None):
            raise ValueError("the type of a part must be a text")
        if kind in TEXTS:
            texts.append(text_or_none(part.get("text"), "the text of a part") or "")
        elif kind not in THOUGHTS:
            said = {key: value for key, value in part.items() if key not in DECORATIONS and value is not None}
            others.append(documents.dumps(said, sort_keys=True))
    return _plain_text("".join(texts)), others


def _plain_text(text: str) -> str:
    return text.replace("\r\n", "\n").strip()


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        # A pair whose halves came in two chunks is the character that it stands for.
        whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return whole.encode("utf-8", "surrogatepass")


def _arguments(text: str) -> bytes:
    """Arguments in one spelling: clients parse them and write them anew."""
    if not text.strip():
        return b"{}"
    try:
        value = documents.loads(text)
        if isinstance(value, str):
            # What is no JSON, the Vercel AI SDK sends back as a JSON string.
            return _utf8(value)
        return documents.dumps(_plain_numbers(value), sort_keys=True)
    except (ValueError, OverflowError, RecursionError):
        return _utf8(text)


def _plain_numbers(value: Any) -> Any:
    """``value`` with its numbers as JavaScript would write them: there is no 1.0 there, and all are doubles."""
    if isinstance(value, dict):
        return {key: _plain_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain_numbers(inner) for inner in value]
    if isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST_EXACT:
        return int(value)
    if isinstance(value, int) and abs(value) > _LARGEST_EXACT:
        return float(value)
    return value
