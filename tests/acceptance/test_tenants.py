"""Tenants on one engine cannot tell each other's prompts by what is cached or stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from prompts import PAGE, TINY, Generated, Generator, prompt
from stacks import MakeStack

from agentstate import Client
from agentstate.cli.local import LocalStack
from agentstate.sessions import tenants
from agentstate.settings import Settings
from agentstate.sql.database import Database

PAGES = 5


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, make_stack: MakeStack, checkpoints: Path) -> Iterator[LocalStack]:
    with closing(make_stack(tmp_path_factory.mktemp("tenants"), checkpoints / "llama")) as stack:
        stack.start_service()
        stack.start_engine(*TINY)
        yield stack


class Tenant:
    """A tenant of a stack, with a key of its own."""

    def __init__(self, stack: LocalStack, name: str, kv_group: str | None = None):
        self._stack = stack
        database = Database(Settings(home=stack.home).sqlalchemy_url)
        with database.write() as connection:
            self._key = tenants.create_key(connection, name).secret
            tenants.put(connection, replace(tenants.find(connection, name), kv_group=kv_group))
        database.close()

    def asks(self, text: list[int]) -> Generated:
        """In a session of its own."""
        with Client(self._stack.service_url, api_key=self._key, timeout_s=60) as client:
            session = client.create_session(self._stack.model)
            with client.turn(session.id) as turn:
                return Generator(self._stack.engine_url)(text, **turn.extra_body)


def text(seed: int) -> list[int]:
    return prompt(seed, PAGES * PAGE + 20)


def test_a_tenant_finds_nothing_of_another_tenants_prompts(several: LocalStack) -> None:
    one, other = Tenant(several, "one"), Tenant(several, "other")
    secret = [text(9100 + i) for i in range(20)]
    for said in secret:
        assert one.asks(said).cached == 0
    for on_device in (True, False):
        if not on_device:
            several.settle()
            several.flush_device()
        right = [other.asks(said[: PAGE * 3 + 5]) for said in secret[on_device::2]]
        wrong = [other.asks(text(9200 + 100 * on_device + i)[: PAGE * 3 + 5]) for i in range(len(right))]
        assert len(right) == 10
        assert {(answer.cached, answer.restored) for answer in right + wrong} == {(0, 0)}
    # Who sends no salt finds nothing either; the tenant itself does, in any of its sessions.
    assert Generator(several.engine_url)(secret[0]).cached == 0
    assert one.asks(secret[0]).cached == PAGES * PAGE


def test_tenants_of_a_group_share(several: LocalStack) -> None:
    one, two, alone = Tenant(several, "g1", "g"), Tenant(several, "g2", "g"), Tenant(several, "g")
    said = text(9400)
    assert one.asks(said).cached == 0
    assert two.asks(said).cached == PAGES * PAGE
    assert alone.asks(said).cached == 0
