"""Whom the pages of a request are charged to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from agentstate.fleet import turns
from agentstate.fleet.turns import Turn
from engine_patch.linker import AgentStateLinker
from engine_patch.turns import RequestSession

KEY = turns.signing_key(b"of the installation")


def linked() -> tuple[AgentStateLinker, list[Any]]:
    """A linker that knows the installation's key, and what it has offered."""
    linker: Any = object.__new__(AgentStateLinker)
    offered: list[Any] = []

    def turn(session: RequestSession) -> Turn | None:
        return None if session.token is None else turns.verify(KEY, str(session), session.token)

    def offer(transfers: Any, ready: Any, session_id: str | None, owner: str) -> bool:
        offered.append((type(session_id), session_id, owner))
        return True

    linker._rank = SimpleNamespace(off=None, sessions=SimpleNamespace(turn=turn))
    linker._pools = SimpleNamespace(offer=offer)
    return linker, offered


@pytest.mark.parametrize("form", [str, RequestSession])
def test_pages_are_charged_to_the_account_of_the_turn_that_a_request_proves(form: type[str]) -> None:
    linker, offered = linked()
    assert linker.offload([], session_id=form(turns.sign(KEY, Turn("ses_1", 1, "tenant a"))))
    assert offered == [(str, "ses_1", "tenant a")]


def test_pages_of_a_request_that_proves_no_turn_are_nobodys() -> None:
    linker, offered = linked()
    forged = turns.sign(b"of another", Turn("ses_1", 1, "tenant a"))
    assert linker.offload([], session_id="ses_1") and linker.offload([], session_id=forged) and linker.offload([])
    assert offered == [(str, "ses_1", ""), (str, "ses_1", ""), (type(None), None, "")]
