"""What a gateway hands over to an engine beside a request: HTTP headers that say whose the request is.

A gateway forwards a client's body as it came. What belongs to the turn goes into headers of its own, which mean the
same on every route, also where SGLang drops such fields from the body. If one of these headers is there, the engine
takes the session, the salt and the extra key from them alone: whatever the body says of these counts for nothing, and
what no header names is not set. A gateway that forwards a request without a handover leaves the body in force.

Values are percent-encoded UTF-8, so that a salt or an extra key may be any text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from urllib.parse import quote, unquote_to_bytes

_HEADERS = {
    "session": "x-agentstate-turn",
    "salt": "x-agentstate-salt",
    "extra_key": "x-agentstate-extra-key",
    "request_id": "x-agentstate-request",
}
_ENCODED = re.compile(r"(?:[!-$&-~]|%[0-9A-Fa-f]{2})+")

NAMES = frozenset(name.encode() for name in _HEADERS.values())
"""The headers' names, in lower case. A gateway removes them from what clients send."""


@dataclass(frozen=True)
class Handover:
    """``session`` is ``ID.TOKEN`` (see `fleet.turns`), ``salt`` and ``extra_key`` go into the keys of the request's
    pages, and ``request_id`` is the id that the engine knows the request by; None where there is none.

    Raises ValueError if all are None, because nothing would tell the engine to leave the body's fields alone, and if
    one is empty.
    """

    # What proves a turn, and what keeps its pages apart, is in no log.
    session: str | None = field(default=None, repr=False)
    salt: str | None = field(default=None, repr=False)
    extra_key: str | None = None
    request_id: str | None = None

    def __post_init__(self) -> None:
        values = [getattr(self, part.name) for part in fields(self)]
        if all(value is None for value in values):
            raise ValueError("a handover names at least one of session, salt, extra_key and request_id")
        if "" in values:
            raise ValueError("nothing that is handed over may be empty")

    def headers(self) -> list[tuple[bytes, bytes]]:
        """As ASGI has headers, names in lower case. Raises ValueError for text that UTF-8 cannot encode."""
        values = {header: getattr(self, part) for part, header in _HEADERS.items()}
        return [
            (header.encode(), quote(value, safe="").encode()) for header, value in values.items() if value is not None
        ]

    @classmethod
    def read(cls, headers: Mapping[str, str]) -> Handover | None:
        """What the headers of a request hand over, or None if none of them does. The mapping has names in lower case,
        or ignores their case. Raises ValueError if a value is not percent-encoded UTF-8."""
        found = {part: value for part, header in _HEADERS.items() if (value := headers.get(header)) is not None}
        if not found:
            return None
        return cls(**{part: _decode(_HEADERS[part], value) for part, value in found.items()})


def _decode(header: str, value: str) -> str:
    try:
        if _ENCODED.fullmatch(value):
            return unquote_to_bytes(value).decode()
    except UnicodeDecodeError:
        pass
    raise ValueError(f"the header {header} is not percent-encoded UTF-8")
