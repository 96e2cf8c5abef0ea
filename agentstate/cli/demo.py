"""`agentstate demo`: an agent works and is suspended, its engine is killed, and it resumes from its pages on disk.

It runs what a user runs: SGLang with the plug-in, `agentstate serve`, and the agent of `examples/openai_loop.py`, each
as its own process. A second agent does the same work and is never suspended; the first one's continuation must equal
its, token for token. Beside them works `examples/openai_agent.py`, which knows nothing but the gateway's base URL. At
last an agent calls a slow tool: another one needs its room on the device meanwhile, and it is back before the tool has
ended.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from agentstate.cli.demo_parts import EXAMPLES, checkpoint, console, first_token, print_times, run_agent, step
from agentstate.cli.local import LocalStack
from agentstate.client import Client
from agentstate.errors import EngineError
from agentstate.settings import Settings

ENGINE_PORT, SERVICE_PORT = 30701, 8701
PAIRS = 5
# The last engine's KV pool: the agent's context fits, and not with another one's of so many words.
POOL_TOKENS = 6144
OTHER_WORDS = 3000
TOOL_S = 20.0
PLAIN_EXAMPLE = EXAMPLES / "openai_agent.py"


@dataclass(frozen=True)
class Figures:
    """The demo's results. Times are client-side, from sending a request to its first token, medians if measured more
    than once; ``ttft_after_restart_s`` is the restarted engine's first request with this context."""

    context_tokens: int
    tokens_restored: int
    bytes_read: int
    restore_gb_per_s: float
    ttft_recomputed_s: float
    ttft_restored_s: float
    ttft_memory_hit_s: float
    ttft_after_restart_s: float
    covered: bool
    identical: bool
    away: Away


@dataclass(frozen=True)
class Away:
    """Of an agent that called a tool: how many tokens of its context the device had when the call began, while another
    agent was served, and before the tool ended; and how many its next request found there."""

    before: int
    displaced: int
    back: int
    found: int
    back_after_s: float


def run(settings: Settings, report: Path | None) -> bool:
    """Run the demo, print its table, write ``report``. Returns whether the agent was restored and went on unchanged."""
    model = checkpoint(settings)
    home = settings.home / "demo"
    shutil.rmtree(home, ignore_errors=True)  # the last run's pages and sessions
    stack = LocalStack(
        home,
        model,
        engine_python=settings.engine_python,
        service_port=SERVICE_PORT,
        engine_port=ENGINE_PORT,
    )
    with closing(stack), tempfile.TemporaryDirectory() as scratch:
        figures = _Play(stack, Path(scratch)).run()
    _print(figures)
    if report is not None:
        report.write_text(json.dumps(asdict(figures), indent=2) + "\n")
        console.print(f"Figures written to {report}")
    return figures.covered and figures.identical


class _Play:
    """One run of the demo. Its agents have their own KV namespaces: no run finds another's pages."""

    def __init__(self, stack: LocalStack, scratch: Path):
        self._stack = stack
        self._scratch = scratch
        self._run = uuid.uuid4().hex[:8]

    def run(self) -> Figures:
        with step("starting the service and the engine (SGLang on this machine)"):
            self._stack.start_service()
            self._stack.start_engine()
        console.print("\n[bold]An agent that is never suspended[/], to compare with")
        control = self._agent("control", "survey,conclude")
        console.print("\n[bold]The agent[/]")
        before = self._agent("agent", "survey")
        if before["kv"]["state"] != "durable":
            raise EngineError(f"the agent's KV is {before['kv']['state']}, not durable")
        console.print("\n[bold]An agent on the plain OpenAI client[/], of which only the base URL was changed")
        self._plain_agent("What is a page?")
        with step("kill -9 the engine, and start it again"):
            self._stack.kill_engine()
            self._stack.start_engine("--max-total-tokens", str(POOL_TOKENS))
        console.print("\n[bold]The agent resumes[/], in a new process, on the new engine")
        after = self._agent("agent", "conclude")
        turn = after["turns"][0]
        console.print("\n[bold]The agent on the plain OpenAI client[/] goes on")
        self._plain_agent("And an extent?")
        with step(f"measuring: {PAIRS} × restored and memory hit in turn, then recomputed"):
            restored, hits, recomputed, n_bytes, seconds = self._measure(after["messages"][:-2])
        with step(f"an agent calls a tool that takes {TOOL_S:g} s, and another one needs the device"):
            away = self._wait_for_a_tool(after["messages"][:-2])
        return Figures(
            context_tokens=turn["prompt_tokens"],
            tokens_restored=turn["cached_tokens"],
            bytes_read=n_bytes,
            restore_gb_per_s=round(n_bytes / seconds / 1e9, 2),
            ttft_recomputed_s=round(recomputed, 3),
            ttft_restored_s=round(statistics.median(restored), 3),
            ttft_memory_hit_s=round(statistics.median(hits), 3),
            ttft_after_restart_s=round(turn["ttft_s"], 3),
            covered=turn["cached_tokens"] == before["kv"]["tokens"] > 0,
            identical=turn["text"] == control["turns"][-1]["text"],
            away=away,
        )

    def _wait_for_a_tool(self, history: list[dict[str, Any]]) -> Away:
        """An agent whose context is ``history`` waits for a tool, and another one is served meanwhile."""
        text = " ".join(f"{number % 10}" for number in range(OTHER_WORDS // 2))
        with Client(self._stack.service_url) as client:
            waiting = client.create_session(self._stack.model, cache_salt=f"agent-{self._run}").id
            other = client.create_session(self._stack.model).id
            with client.turn(waiting, reason="tool_wait") as turn:
                self._send(history, "0. What did you read?", turn.extra_body)
                client.claim_tool_call(waiting, "call_1", "build", expected_s=TOOL_S, lease=turn.lease)
            called_s = time.monotonic()
            before = self._on_device(client, waiting)
            with client.turn(other, reason="done") as turn:
                self._send([{"role": "user", "content": text}], "What comes next?", turn.extra_body)
                displaced = self._on_device(client, waiting)
            while (back := self._on_device(client, waiting)) < before and time.monotonic() < called_s + TOOL_S:
                time.sleep(0.1)
            back_after_s = time.monotonic() - called_s
            time.sleep(max(0.0, TOOL_S - back_after_s))
            client.finish_tool_call(waiting, "call_1", output="built")
            with client.turn(waiting) as turn:
                _, found = self._send(history, "1. What did you build?", turn.extra_body)
        return Away(before, displaced, back, found, round(back_after_s, 1))

    def _on_device(self, client: Client, session_id: str) -> int:
        tiers = client.kv(session_id).tiers
        return tiers["device"].tokens if tiers else 0

    def _measure(self, history: list[dict[str, Any]]) -> tuple[list[float], list[float], float, int, float]:
        """Times to first token: restored and as memory hits, alternating, and recomputed once; then the bytes and
        seconds of one restore, by the engine's own count, medians."""
        salt = f"agent-{self._run}"
        restored, hits, n_bytes, seconds = [], [], [], []
        for pair in range(PAIRS):
            self._stack.flush_device()
            earlier = self._stack.stat()["restore"]
            # A different first word keeps a question from hitting another one's pages.
            restored.append(self._ask(history, f"{2 * pair}. What did you read?", salt))
            later = self._stack.stat()["restore"]
            n_bytes.append(later["bytes_read"] - earlier["bytes_read"])
            seconds.append(later["seconds"] - earlier["seconds"])
            hits.append(self._ask(history, f"{2 * pair + 1}. What did you read?", salt))
        recomputed = self._ask(history, "0. What did you read?", uuid.uuid4().hex)
        return restored, hits, recomputed, int(statistics.median(n_bytes)), statistics.median(seconds)

    def _agent(self, name: str, steps: str) -> dict[str, Any]:
        return run_agent(self._stack, f"{name}-{self._run}", steps, self._scratch / f"{name}.json")

    def _plain_agent(self, question: str) -> None:
        """Run the agent that knows only a base URL, as a process."""
        own = {"OPENAI_BASE_URL": f"{self._stack.service_url}/v1", "OPENAI_API_KEY": "none"}
        command = [sys.executable, str(PLAIN_EXAMPLE), str(self._scratch / "plain.json"), question]
        if subprocess.run(command, env={**self._stack.environment, **own}, check=False).returncode:
            raise EngineError("the agent on the plain client failed; the lines above say why")

    def _ask(self, history: list[dict[str, Any]], question: str, salt: str) -> float:
        """Seconds to the first token of a question asked after ``history``, in the KV namespace ``salt``."""
        return self._send(history, question, {"cache_salt": salt})[0]

    def _send(self, history: list[dict[str, Any]], question: str, more: dict[str, Any]) -> tuple[float, int]:
        return first_token(self._stack, history, question, more)


def _print(figures: Figures) -> None:
    print_times(
        f"Turn 2 of an agent with a context of {figures.context_tokens:,} tokens",
        {
            "recomputed (no AgentState)": figures.ttft_recomputed_s,
            "restored from disk, first request after the restart": figures.ttft_after_restart_s,
            f"restored from disk (median of {PAIRS})": figures.ttft_restored_s,
            f"memory hit, the floor (median of {PAIRS})": figures.ttft_memory_hit_s,
        },
        hit_s=figures.ttft_memory_hit_s,
        recomputed_s=figures.ttft_recomputed_s,
    )
    console.print(
        f"restored {figures.tokens_restored:,} tokens, {figures.bytes_read:,} bytes at {figures.restore_gb_per_s} GB/s "
        f"while the forward ran; covers the whole page-aligned prefix: {'yes' if figures.covered else 'NO'}; "
        f"same tokens as the agent that was never suspended: {'yes' if figures.identical else 'NO'}"
    )
    away = figures.away
    table = Table(title=f"An agent whose tool takes {TOOL_S:g} s, beside another that needs the device")
    table.add_column("on the device")
    table.add_column("tokens", justify="right")
    table.add_row("when the tool was called", f"{away.before:,}")
    table.add_row("while the other agent was served", f"{away.displaced:,}")
    table.add_row(f"after {away.back_after_s:.1f} s, before the tool ended", f"{away.back:,}")
    table.add_row("found by its next request", f"{away.found:,}")
    console.print(table)
