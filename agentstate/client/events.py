"""Incremental parsing of server-sent events."""

from __future__ import annotations

import re
from collections.abc import Iterator

from agentstate import documents
from agentstate.answers import Entry, Rewound, Session
from agentstate.client.transport import GATEWAY
from agentstate.errors import AgentStateError, RequestRefused

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
# No other character ends a line: a text may contain those that only Unicode counts as line ends.
_LINE_END = re.compile(rb"\r\n|\r|\n")

Event = Entry | Session | Rewound


class Following:
    """The progress of following a session: ``seq`` is the last entry's, ``ended`` whether the session has ended."""

    def __init__(self, after: int):
        self.seq = after
        self.ended = False
        self._connected = False
        self._failures = 0
        self._line: list[bytes] = []
        self._after_cr = False
        self._kind = ""
        self._data: list[str] = []

    def begin(self) -> None:
        """Start a new connection, and drop any partial event of the last one."""
        self._connected = True
        self._failures = 0
        self._line, self._after_cr = [], False
        self._kind, self._data = "", []

    def pause_s(self, error: AgentStateError) -> float:
        """How long to back off before reconnecting. Raises ``error`` if reconnecting is of no use."""
        away = error.retryable or (isinstance(error, RequestRefused) and error.status in GATEWAY)
        if not (self._connected and away):
            raise error
        self._failures += 1
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * float(1 << min(self._failures, 10)))

    def take(self, chunk: bytes) -> Iterator[Event]:
        """The events that a piece of the stream completes. Skips comments and unknown kinds of events."""
        if self._after_cr and chunk:
            chunk, self._after_cr = chunk.removeprefix(b"\n"), False
        first, *others = _LINE_END.split(chunk)
        self._line.append(first)
        if chunk.endswith(b"\r"):
            self._after_cr = True
        for begun in others:
            line, self._line = b"".join(self._line).decode(), [begun]
            yield from self._take_line(line)

    def _take_line(self, line: str) -> Iterator[Event]:
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "event":
                self._kind = value
            elif name == "data":
                self._data.append(value)
            return
        kind, data = self._kind, "\n".join(self._data)
        self._kind, self._data = "", []
        if kind == "entry":
            entry = documents.parse(Entry, data)
            self.seq = entry.seq
            yield entry
        elif kind == "rewind":
            rewound = documents.parse(Rewound, data)
            self.seq = rewound.seq
            yield rewound
        elif kind == "session":
            yield documents.parse(Session, data)
        elif kind == "end":
            self.ended = True
