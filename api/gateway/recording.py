"""What an answer said, taken from copies of what the engine sends.

A recorder never raises: what an engine sends reaches the client whether it is understood here or not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from agentstate.api.gateway import documents
from agentstate.api.gateway.heard import Message

# What reading a document raises that is not in the form it should be in.
UNKNOWN_FORM = (AttributeError, KeyError, IndexError, TypeError, ValueError)

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Answer:
    """What an answer said.

    ``messages`` are what the model said: none where the answer is not whole, failed, is several choices, or cannot be
    read. ``whole`` says that the stream had its proper end, or that the JSON is all there, whatever it says.
    ``finish`` is the reason that the answer ended for, in its API's word (``stop``, ``end_turn``, ``completed``).
    ``usage`` is as the API has it; ``cached_tokens`` is None where it does not tell. ``error`` is the error that the
    answer is or that it ended with. ``response`` is the response object of the Responses API, if it came.
    """

    messages: tuple[Message, ...] = ()
    whole: bool = False
    finish: str | None = None
    usage: dict[str, Any] | None = None
    cached_tokens: int | None = None
    error: dict[str, Any] | None = None
    response: dict[str, Any] | None = None


class Recorder(ABC):
    """Takes what the engine sends, cut anywhere, and tells at the end what it said."""

    @abstractmethod
    def feed(self, data: bytes) -> None:
        """The next bytes of the answer's body."""

    @abstractmethod
    def end(self) -> Answer:
        """What was said until now. To be called once, when the body has ended or broken off."""


class Whole(Recorder):
    """An answer that is one JSON document, which ``read`` understands."""

    def __init__(self, read: Callable[[dict[str, Any]], Answer]):
        self._read = read
        self._body: list[bytes] = []

    def feed(self, data: bytes) -> None:
        self._body.append(data)

    def end(self) -> Answer:
        try:
            body = documents.loads(b"".join(self._body))
        except ValueError:
            return Answer()
        try:
            return self._read(body)
        except UNKNOWN_FORM:
            return Answer(whole=True, error=error_of(body))


class Stream(Recorder):
    """An answer of server-sent events.

    ``done`` is to be set by what ends the stream properly; nothing after that is heard. ``readable`` is false once an
    event was in no form that is known: what was said is not known then.
    """

    def __init__(self) -> None:
        self.done = False
        self.readable = True
        self._events = Events()

    def feed(self, data: bytes) -> None:
        for name, payload in self._events.feed(data):
            if self.done:
                return
            try:
                self.hear(name, payload)
            except UNKNOWN_FORM:
                self.readable = False

    def end(self) -> Answer:
        answer = self.told()
        if not (self.done and self.readable and answer.finish) or answer.error:
            return answer
        try:
            return replace(answer, messages=self.said())
        except UNKNOWN_FORM:
            return answer

    @abstractmethod
    def hear(self, name: bytes, payload: bytes) -> None:
        """One event; ``name`` is empty if it has none."""

    @abstractmethod
    def told(self) -> Answer:
        """The answer until now, without its messages."""

    @abstractmethod
    def said(self) -> tuple[Message, ...]:
        """What the model said, once the answer is whole."""


class Events:
    """Cuts a body into server-sent events; keeps only what is not yet an event."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0
        self._after_return = False

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """The events that are complete now, as name and data. Comments and events without data are left out."""
        buffer, events = self._buffer, []
        buffer += self._in_newlines(data)
        begin, search = 0, max(self._searched - 1, 0)
        while (end := buffer.find(b"\n\n", search)) >= 0:
            if event := _parse(bytes(buffer[begin:end])):
                events.append(event)
            begin = search = end + 2
        del buffer[:begin]
        self._searched = len(buffer)
        return events

    def _in_newlines(self, data: bytes) -> bytes:
        """``data`` with newlines as its only line ends: CRLF and CR are others, and a cut may part CR from LF."""
        if not data:
            return data
        if self._after_return and data.startswith(b"\n"):
            data = data[1:]
        if b"\r" in data:
            self._after_return = data.endswith(b"\r")
            return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        self._after_return = False
        return data


def _parse(block: bytes) -> tuple[bytes, bytes] | None:
    if block.startswith(b"data: ") and b"\n" not in block:
        return b"", block[6:]
    name, lines = b"", []
    for line in block.removeprefix(_BYTE_ORDER_MARK).split(b"\n"):
        field, _, value = line.partition(b":")
        if field == b"data":
            lines.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ")
    return (name, b"\n".join(lines)) if lines else None


def error_of(document: Any) -> dict[str, Any] | None:
    """The error that a body or an event is, as an object. It may be in it as an object or a text; SGLang's are flat."""
    if not isinstance(document, dict):
        return None
    error = document.get("error")
    if isinstance(error, dict):
        return error
    if isinstance(error, str):
        return {"message": error}
    return document if document.get("object") == "error" else None


def count(usage: dict[str, Any] | None, *path: str) -> int | None:
    """A number in a usage; zero is one, too."""
    value: Any = usage
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, int) else None
