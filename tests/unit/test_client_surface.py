"""What the client offers, and how its methods present themselves."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import agentstate
from agentstate import client
from agentstate.client import routes
from agentstate.client.events import Following


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


def test_events_are_read_line_by_line() -> None:
    following = Following(after=3)
    entry = (
        '{"id": "e", "session_id": "s", "parent_id": null, "seq": 4, "kind": "note", "payload": {}, "call_id": null, '
        '"created_at": "2026-01-05T09:30:00Z"}'
    )
    cut_off = ["event: entry", "data: {"]
    lines = [": still here", "", "event: entry", "id: 4", f"data: {entry}", "", "event: unheard-of", "data: 1", ""]
    assert [found for line in cut_off for found in following.take(line)] == []
    following.begin()
    (found,) = [found for line in lines for found in following.take(line)]
    assert (found.id, following.seq, following.ended) == ("e", 4, False)
    assert [found for line in ("event: end", "data: {}", "") for found in following.take(line)] == []
    assert following.ended
