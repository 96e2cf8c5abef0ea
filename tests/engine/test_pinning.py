"""Contexts that are to stay for a time: on the device in both of SGLang's trees, in host memory, and on the drive."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from radix_tree import TREES, Tree
from test_eviction import SOON, evict, filled, there

from agentstate.fleet.quotas import Quota
from agentstate.lookahead import policies
from engine_patch.accounts import Accounts
from engine_patch.pinning import Pinning
from engine_patch.waits import PINNED, Waits

pytestmark = pytest.mark.usefixtures("parallel")


@pytest.mark.parametrize("backend", TREES)
def test_what_is_pinned_leaves_after_all_that_waits_until_its_pin_ends(backend: str) -> None:
    tree = Tree(backend)
    keys = filled(tree)
    waits = tree.store.waits
    waits.pin("a", "device", 60.0)
    for session in ("b", "c", "d"):
        assert waits.foresee(session, SOON, 0.0, "tool")
    assert evict(tree, 18) == 18
    assert there(tree, keys) == {"a": 8, "b": 2, "c": 2, "d": 2}
    assert evict(tree, 1) == 6, "who needs all of the room gets it"
    tree.reset()
    keys = filled(tree)
    waits.pin("a", "device", 60.0)
    tree.now_s += 60.0
    assert evict(tree, 6) == 6
    assert there(tree, keys) == {"a": 2, "b": 8, "c": 8, "d": 8}
    assert waits.foreseen == 0


def test_a_request_that_is_served_is_worth_more_than_any_pin() -> None:
    waits = Waits(policies.planner, lambda: 0.0)
    for session in ("served", "pinned"):
        waits.began(session)
        assert waits.pin(session, "device", 60.0)
    waits.over("served")
    assert waits.index("served") == math.inf > waits.index("pinned") == PINNED
    waits.unpin("pinned")
    assert 0 < waits.index("pinned") < PINNED


def test_a_pin_to_a_tier_holds_on_those_below_it() -> None:
    waits = Waits(policies.planner, lambda: 0.0)
    for tier in ("device", "host", "nvme"):
        waits.pin(tier, tier, 60.0)
    assert [waits.index(tier) for tier in ("device", "host", "nvme")] == [PINNED, 0.0, 0.0]
    assert [waits.index(tier, "host") for tier in ("device", "host", "nvme")] == [PINNED, PINNED, 0.0]


def test_no_more_sessions_are_pinned_than_are_remembered() -> None:
    waits = Waits(policies.planner, lambda: 0.0, most=2)
    assert [waits.pin(session, "device", 60.0) for session in ("a", "b", "a", "c")] == [True, True, True, False]


class Stage:
    """Every session has ten pages, a page is a byte."""

    def __init__(self, device: int = 40, host: int = 40):
        self.waits = Waits(policies.planner)
        self.accounts = Accounts()
        self.retained: list[tuple[str, float]] = []
        self.most_retained = 10
        self.fetched: list[str] = []
        self.pinning = Pinning(
            self.waits,
            self.accounts,
            size=lambda session: 10,
            n_bytes=int,
            room={"device": device, "host": host}.__getitem__,
            retain=self.retain,
            fetch=self.fetched.append,
        )

    def retain(self, session: str, until_s: float) -> int:
        self.retained.append((session, until_s))
        return self.most_retained

    def pin(self, session: str, tier: str = "device", for_s: float = 60.0) -> tuple[str, str]:
        said = self.pinning.pin(session, tier, for_s)
        return said["state"], said["tier"]

    def tier(self, session: str) -> str | None:
        pin = self.waits.pinned(session)
        return None if pin is None else pin.tier


def test_pins_beyond_half_of_a_tier_hold_on_the_next_below() -> None:
    stage = Stage()
    assert [stage.pin(session) for session in "aabc"] == [("accepted", "device")] * 3 + [("clipped", "host")]
    assert stage.fetched == ["c"]
    assert stage.pin("d", "host") == ("accepted", "host")
    assert stage.pin("e") == ("clipped", "nvme")
    assert stage.pin("a", for_s=0.0) == ("unpinned", "device")
    assert stage.retained[-1] == ("a", 0.0)
    assert stage.pin("f") == ("accepted", "device")


def test_an_account_pins_within_its_quota() -> None:
    stage = Stage(device=1000, host=0)
    for session in "abc":
        stage.accounts.note(session, "one")
    stage.accounts.take({"one": Quota(device_bytes=25)})
    assert [stage.pin(session) for session in "abcd"] == [("accepted", "device")] * 2 + [
        ("clipped", "nvme"),
        ("accepted", "device"),
    ]


def test_of_a_session_that_is_not_kept_whole_on_the_drive_it_is_said() -> None:
    stage = Stage()
    stage.most_retained = 4
    assert stage.pinning.pin("a", "nvme", 60.0) == {"state": "clipped", "tier": "nvme", "pages": 4, "bytes": 4}


def test_pins_of_sql_hold_after_a_restart_and_end_with_it() -> None:
    stage = Stage()
    stage.pinning.take({"a": ("device", 60.0), "b": ("nvme", 60.0)})
    assert (stage.tier("a"), stage.tier("b")) == ("device", "nvme")
    before = len(stage.retained)
    stage.pinning.take({"a": ("device", 60.0), "b": ("nvme", 60.0)})
    assert len(stage.retained) == before, "what is known is not done again"
    assert stage.pin("hinted") == ("accepted", "device")
    stage.pinning.take({"b": ("nvme", 60.0)})
    assert (stage.tier("a"), stage.tier("b"), stage.tier("hinted")) == (None, "nvme", "device")
    stage.pinning.take({"b": ("device", 600.0)})
    assert stage.tier("b") == "device"
    until_s: Any = stage.pinning.until_s("b")
    assert until_s - time.monotonic() > 500
