"""The Python client of the HTTP API: one method per route, typed answers, and this package's own errors.

::

    with Client("http://127.0.0.1:8700") as client:
        session = client.ensure_session("agent-17", "smollm2")
        with client.turn(session.id) as turn:                  # takes the lease, and renews it while the block runs
            turn.append(message({"role": "user", "content": "Hello"}))
            ...                                                # call the engine: turn.base_url, turn.extra_body
        print(turn.suspended.kv)                               # set however the block ended
"""

from agentstate.client.clients import AsyncClient, Client
from agentstate.client.entries import message, note, tool_call, tool_error, tool_output
from agentstate.client.turn import AsyncTurn, Turn

__all__ = [
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
