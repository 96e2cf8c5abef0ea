"""What the client offers, and how its methods present themselves."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import agentstate
from agentstate import client
from agentstate.answers import Entry, Rewound
from agentstate.client import routes
from agentstate.client.events import LONGEST_PAUSE_S, Following
from agentstate.errors import DatabaseError, RequestRefused, ServiceUnreachable, SessionNotFound


def test_what_is_exported() -> None:
    assert agentstate.__all__ == ["AsyncClient", "Client", "__version__"]
    assert agentstate.Client is client.Client
    assert client.__all__ == [
        "AsyncClient",
        "AsyncTurn",
        "Client",
        "Turn",
        "message",
        "note",
        "tool_call",
        "tool_error",
        "tool_output",
    ]
    with pytest.raises(AttributeError, match="Klient"):
        _ = agentstate.Klient


def test_the_package_itself_imports_no_http_client() -> None:
    program = "import sys, agentstate; sys.exit('httpx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("kind", [client.Client, client.AsyncClient])
def test_a_method_looks_like_its_route(kind: type) -> None:
    for name in ("create_session", "fork", "append"):
        method, route = getattr(kind, name), getattr(routes, name)
        assert method.__doc__ == route.__doc__
        assert list(inspect.signature(method).parameters)[1:] == list(inspect.signature(route).parameters)
        assert method.__name__ == name


def test_names_are_quoted_in_paths() -> None:
    assert routes.read("a/b ?").path == "/v1/sessions/a%2Fb%20%3F"


ENTRY = (
    '{"id": "e", "session_id": "s", "parent_id": null, "seq": 4, "kind": "note", "payload": {"text": "TEXT"}, '
    '"call_id": null, "created_at": "2026-01-05T09:30:00Z"}'
)


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_events_are_read_line_by_line(end: str) -> None:
    text = "one\u2028two\u2029three\u0085fourfive"
    following = Following(after=3)
    assert list(following.take(f"event: entry{end}data: {{".encode())) == []
    lines = [": still here", "", "event: entry", "id: 4", f"data: {ENTRY.replace('TEXT', text)}", ""]
    lines += ["event: unheard-of", "data: 1", ""]
    stream = "".join(line + end for line in lines).encode()
    for cut in range(len(stream)):
        following = Following(after=3)
        following.begin()
        (found,) = [*following.take(stream[:cut]), *following.take(stream[cut:])]
        assert isinstance(found, Entry)
        assert (found.payload["text"], following.seq) == (text, 4)
        assert not following.ended
    assert [*following.take(f"event: rewind{end}id: 2{end}".encode())] == []
    (rewound,) = following.take(f'data: {{"session_id": "s", "seq": 2}}{end}{end}'.encode())
    assert (rewound, following.seq) == (Rewound(session_id="s", seq=2), 2)
    assert list(following.take(f"event: end{end}data: {{}}{end}{end}".encode())) == []
    assert following.ended


def test_a_follower_that_was_connected_waits_for_a_service_that_is_away() -> None:
    following = Following(after=0)
    with pytest.raises(ServiceUnreachable):
        following.pause_s(ServiceUnreachable())
    following.begin()
    pauses = [following.pause_s(error) for error in (ServiceUnreachable(), DatabaseError()) * 10]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_S
    assert following.pause_s(RequestRefused(status=502)) == LONGEST_PAUSE_S
    for final in (RequestRefused(status=404), SessionNotFound()):
        with pytest.raises(type(final)):
            following.pause_s(final)
    following.begin()
    assert following.pause_s(DatabaseError()) == pauses[0]
