"""Whom the pages of a request are charged to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from radix_tree import TREES, Tree, key_of
from test_lost_pages import pages_of

from agentstate.fleet import turns
from agentstate.fleet.turns import Turn
from engine_patch.linker import AgentStateLinker
from engine_patch.radix_cache import AgentStateRadixCache
from engine_patch.sglang_api import UnifiedRadixCache
from engine_patch.turns import RequestSession

KEY = turns.signing_key(b"of the installation")


def linked() -> tuple[AgentStateLinker, list[Any]]:
    """A linker that knows the installation's key, and what it has offered."""
    linker: Any = object.__new__(AgentStateLinker)
    offered: list[Any] = []

    def turn(session: RequestSession) -> Turn | None:
        return None if session.token is None else turns.verify(KEY, str(session), session.token)

    def offer(transfers: Any, ready: Any, session_id: str | None, owner: str, rid: str) -> bool:
        offered.append((type(session_id), session_id, owner, rid))
        return True

    linker._rank = SimpleNamespace(off=None, sessions=SimpleNamespace(turn=turn))
    linker._pools = SimpleNamespace(offer=offer)
    linker.inserting("r1")
    return linker, offered


@pytest.mark.parametrize("form", [str, RequestSession])
def test_pages_are_charged_to_the_account_of_the_turn_that_a_request_proves(form: type[str]) -> None:
    linker, offered = linked()
    assert linker.offload([], session_id=form(turns.sign(KEY, Turn("ses_1", 1, "tenant a"))))
    assert offered == [(str, "ses_1", "tenant a", "r1")]


def test_pages_of_a_request_that_proves_no_turn_are_nobodys() -> None:
    linker, offered = linked()
    forged = turns.sign(b"of another", Turn("ses_1", 1, "tenant a"))
    assert linker.offload([], session_id="ses_1") and linker.offload([], session_id=forged) and linker.offload([])
    assert offered == [(str, "ses_1", "", "r1"), (str, "ses_1", "", "r1"), (type(None), None, "", "r1")]


@pytest.mark.usefixtures("parallel")
@pytest.mark.parametrize("backend", TREES)
def test_a_tree_offers_what_was_not_stored_again_when_another_request_uses_it(backend: str) -> None:
    """On this `AGENTSTATE_ONE_SHOTS=off` relies."""
    tree, shared, longer = Tree(backend), key_of(4, shared=4), key_of(6, shared=4)
    tree.compute(shared, "")
    assert tree.store.offers == [pages_of(shared)]
    tree.settle(stored=False)
    tree.compute(longer, "")
    assert sorted(page for offer in tree.store.offers for page in offer) == sorted(pages_of(longer))
    tree.settle()
    assert tree.protected_size() == 0


@pytest.mark.usefixtures("parallel")
def test_offers_are_known_by_the_request_that_is_inserted(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    cache: Any = object.__new__(AgentStateRadixCache)
    cache.agentstate = SimpleNamespace(inserting=told.append)
    cache.linker = SimpleNamespace(entering={})
    monkeypatch.setattr(UnifiedRadixCache, "checkpoint_into_tree", lambda self, req, **kwargs: told.append("inserted"))
    cache.checkpoint_into_tree(SimpleNamespace(rid="r7", finished=lambda: False), up_to=8)
    assert told == ["r7", "inserted"]
