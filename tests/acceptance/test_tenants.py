"""On one engine, tenants cannot tell each other's prompts by what is cached or stored, and only who runs a session says
what is stored of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from prompts import PAGE, TINY, Generated, Generator, prompt
from stacks import MakeStack

from agentstate import Client
from agentstate.cli.local import LocalStack
from agentstate.fleet import manifests
from agentstate.sessions import tenants
from agentstate.sessions.verbs import Sessions
from agentstate.settings import Settings
from agentstate.sql.database import Database
from agentstate.sql.models import leases

PAGES = 5


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, make_stack: MakeStack, checkpoints: Path) -> Iterator[LocalStack]:
    with closing(make_stack(tmp_path_factory.mktemp("tenants"), checkpoints / "llama")) as stack:
        stack.start_service()
        stack.start_engine(*TINY, "--log-requests", "--log-requests-level", "3")
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


class Run:
    """A session that runs: a turn of it, in which a request has ended."""

    def __init__(self, stack: LocalStack, seed: int):
        self._stack, self.said = stack, text(seed)
        self.turn = stack.begin_turn()
        Generator(stack.engine_url)(self.said, session_id=self.turn.engine_session)
        assert self.stored() == ("durable", PAGES * PAGE)

    def stored(self) -> tuple[str, int]:
        """As the engine says, and SQL."""
        answer = self._stack.control().call("flush", 60, session=self.turn.session.uid, timeout_ms=60_000)
        with closing(Database(Settings(home=self._stack.home).sqlalchemy_url)) as database, database.read() as found:
            (coverage,) = manifests.coverage(found, [self.turn.session.uid])
        assert coverage.tokens == answer["tokens"]
        return answer["state"], answer["tokens"]


def forged(run: Run, other: Run, kind: str) -> str:
    uid, token = run.turn.engine_session.rsplit(".", 1)
    return {
        "id alone": uid,
        "changed": f"{uid}.{token[:-8]}{'A' * 8}",
        "another's": f"{uid}.{other.turn.engine_session.rsplit('.', 1)[1]}",
        "no token": f"{uid}.{'A' * len(token)}",
    }[kind]


@pytest.mark.parametrize("kind", ["id alone", "changed", "another's", "no token"])
def test_who_does_not_run_a_session_changes_nothing_of_it(several: LocalStack, kind: str) -> None:
    run, other = Run(several, 9500), Run(several, 9501)
    generate, said = Generator(several.engine_url), prompt(9502 + len(kind), 2 * PAGE + 5)
    answer = generate(said, session_id=forged(run, other, kind))
    several.settle()
    assert run.stored() == ("durable", PAGES * PAGE)
    # It was served, and stored by its content.
    several.flush_device()
    again = generate(said)
    assert (again.tokens, again.restored) == (answer.tokens, 2 * PAGE)


def test_an_id_that_no_session_has_is_not_kept(several: LocalStack) -> None:
    Generator(several.engine_url)(text(9510), session_id="ses_of_nobody\n")
    several.settle()
    assert several.control().call("flush", 60, session="ses_of_nobody\n", timeout_ms=60_000)["state"] == "unknown"
    with closing(Database(Settings(home=several.home).sqlalchemy_url)) as database, database.read() as connection:
        assert manifests.coverage(connection, ["ses_of_nobody\n", "ses_of_nobody"]) == []


def test_a_runner_that_was_taken_over_from_says_nothing_more(several: LocalStack) -> None:
    run, generate = Run(several, 9520), Generator(several.engine_url)
    with closing(Database(Settings(home=several.home).sqlalchemy_url)) as database:
        with database.write() as connection:
            lease = leases.c.session_id == run.turn.session.uid
            connection.execute(sa.update(leases).where(lease).values(expires_us=1))
        newer = Sessions(database, 60).resume(run.turn.session.id, lease_ttl_s=600, tail=0)
    longer = run.said + prompt(9521, PAGE)
    # Until the engine hears of the new turn by a request, SQL refuses what is of the old one.
    generate(longer, session_id=run.turn.engine_session)
    assert run.stored() == ("durable", PAGES * PAGE)
    generate(run.said, session_id=newer.engine_session)
    generate(longer, session_id=run.turn.engine_session)
    several.settle()
    assert run.stored() == ("durable", PAGES * PAGE)
    generate(longer, session_id=newer.engine_session)
    assert run.stored() == ("durable", (PAGES + 1) * PAGE)


def test_no_token_is_logged(several: LocalStack) -> None:
    run = Run(several, 9530)
    log = (several.home / "engine.log").read_text()
    uid, token = run.turn.engine_session.rsplit(".", 1)
    assert uid in log
    assert token not in log
