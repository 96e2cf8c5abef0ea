"""Server-sent events, as they come in, line by line."""

from __future__ import annotations

from collections.abc import Iterator

from agentstate import documents
from agentstate.answers import Entry, Session


class Following:
    """How far a session was followed: ``seq`` is that of the last entry, ``ended`` whether there is nothing more."""

    def __init__(self, after: int):
        self.seq = after
        self.ended = False
        self._kind = ""
        self._data: list[str] = []

    def begin(self) -> None:
        """A connection begins: what was left of an event on the last one is not one."""
        self._kind, self._data = "", []

    def take(self, line: str) -> Iterator[Entry | Session]:
        """What a line completes. The service's own comments, and kinds that it may add, are passed over."""
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "event":
                self._kind = value
            elif name == "data":
                self._data.append(value)
            return
        kind, data = self._kind, "\n".join(self._data)
        self.begin()
        if kind == "entry":
            entry = documents.parse(Entry, data)
            self.seq = entry.seq
            yield entry
        elif kind == "session":
            yield Session.model_validate_json(data)
        elif kind == "end":
            self.ended = True
