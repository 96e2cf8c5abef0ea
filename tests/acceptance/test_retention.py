"""Whose pages leave the device of a real engine, and whose stay: quotas, pins, and what sessions have left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prompts import PAGE, TINY, Generated, Generator, prompt
from stacks import MakeStack, suspend, until

from agentstate import Client
from agentstate.cli.local import LocalStack
from agentstate.fleet import quotas
from agentstate.fleet.quotas import Quota
from agentstate.sessions import tenants
from agentstate.settings import Settings
from agentstate.sql.database import Database

# The device has 128 pages.
PAGES = 30


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, make_stack: MakeStack, checkpoints: Path) -> Iterator[LocalStack]:
    with closing(make_stack(tmp_path_factory.mktemp("retention"), checkpoints / "llama")) as stack:
        # Without it, the least recently used leave first.
        stack.environment = {**stack.environment, "AGENTSTATE_FORESIGHT": "off"}
        stack.start_service()
        stack.start_engine(*TINY)
        yield stack


class Tenant:
    """A tenant of a stack, with sessions of its own by their names."""

    def __init__(self, stack: LocalStack, name: str):
        self._stack, self.name = stack, name
        with closing(Database(Settings(home=stack.home).sqlalchemy_url)) as database, database.write() as connection:
            key = tenants.create_key(connection, name).secret
        self.client = Client(stack.service_url, api_key=key, timeout_s=60)
        self.sessions: dict[str, str] = {}

    def asks(self, name: str, text: list[int]) -> Generated:
        """In a turn of its session of this name."""
        if name not in self.sessions:
            self.sessions[name] = self.client.create_session(self._stack.model).id
        with self.client.turn(self.sessions[name]) as turn:
            answer = Generator(self._stack.engine_url)(text, **turn.extra_body)
        self._stack.settle()
        return answer

    def may_have(self, n_bytes: int | None) -> None:
        """On the device, and the engine knows."""
        with (
            closing(Database(Settings(home=self._stack.home).sqlalchemy_url)) as database,
            database.write() as connection,
        ):
            quotas.put(connection, f"tenant {self.name}", Quota(device_bytes=n_bytes))
        until(lambda: self.standing()["limit"] == n_bytes)

    def standing(self) -> dict[str, Any]:
        accounts = self._stack.control().call("stat", 60)["accounts"]
        found: dict[str, Any] = accounts.get(f"tenant {self.name}", {"device": {"bytes": 0, "limit": None}})["device"]
        return found


def text(seed: int, pages: int = PAGES) -> list[int]:
    return prompt(seed, pages * PAGE + 9)


def fills(tenant: Tenant, seed: int, sessions: int) -> None:
    for number in range(sessions):
        tenant.asks(f"{seed}-{number}", text(seed + number))


@pytest.mark.parametrize("keeps", ["nothing", "a quota", "a pin"])
def test_one_tenant_fills_the_device_and_anothers_pages_stay(stack: LocalStack, keeps: str) -> None:
    seed = {"nothing": 7000, "a quota": 7100, "a pin": 7200}[keeps]
    suspend(stack)
    small, large = Tenant(stack, f"small-{seed}"), Tenant(stack, f"large-{seed}")
    said = text(seed)
    computed = small.asks("mine", said)
    fills(large, seed + 1, 3)
    assert large.standing()["bytes"] == 3 * small.standing()["bytes"]
    if keeps == "a quota":
        large.may_have(2 * small.standing()["bytes"])
    elif keeps == "a pin":
        pinned = small.client.pin(small.sessions["mine"], ttl_s=3600, tier="device")
        assert (pinned.state, pinned.tier, pinned.tokens) == ("accepted", "device", PAGES * PAGE)
        placement = small.client.kv(small.sessions["mine"])
        assert placement.pin is not None and 3000 < placement.pin.rest_s <= 3600
        assert placement.account is not None and placement.account.name == f"tenant {small.name}"
    fills(large, seed + 20, 2)
    placement = small.client.kv(small.sessions["mine"])
    assert placement.tiers["device"].tokens == (0 if keeps == "nothing" else PAGES * PAGE)
    answer = small.asks("mine", said)
    assert answer.tokens == computed.tokens
    assert answer.restored == (PAGES * PAGE if keeps == "nothing" else 0)
    assert large.standing()["bytes"] > 0, "nobody is refused"
    large.may_have(None)
    small.client.unpin(small.sessions["mine"])


def test_what_a_session_has_left_makes_room_for_others(stack: LocalStack) -> None:
    suspend(stack)
    tenant = Tenant(stack, "edits")
    first = text(7300)
    computed = tenant.asks("oldest", first)
    old = text(7310)
    tenant.asks("edited", old)
    # It says something else from its fifth page on.
    tenant.asks("edited", [*old[: 4 * PAGE], *text(7311)[4 * PAGE :]])
    assert tenant.client.kv(tenant.sessions["edited"]).left_tokens == (PAGES - 4) * PAGE
    fills(tenant, 7320, 2)
    assert tenant.client.kv(tenant.sessions["edited"]).left_tokens == 0
    assert tenant.client.kv(tenant.sessions["oldest"]).tiers["device"].tokens == PAGES * PAGE
    answer = tenant.asks("oldest", first)
    assert (answer.tokens, answer.restored) == (computed.tokens, 0)
    # What has left the device is stored all the same.
    assert tenant.asks("again", old).restored == (PAGES - 4) * PAGE
