"""`agentstate demo`: an agent works and is suspended, its engine is killed, and it resumes from its pages on disk.

It runs what a user runs: SGLang with the plug-in, `agentstate serve`, and the agent of `examples/openai_loop.py`, each
as its own process. A second agent does the same work and is never suspended; the first one's continuation must equal
its, token for token. Beside them works `examples/openai_agent.py`, which knows nothing but the gateway's base URL.
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from agentstate.cli import launcher
from agentstate.cli.local import LocalStack
from agentstate.errors import EngineError, SettingsError
from agentstate.settings import Settings

ENGINE_PORT, SERVICE_PORT = 30701, 8701
PAIRS = 5
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
EXAMPLE = EXAMPLES / "openai_loop.py"
PLAIN_EXAMPLE = EXAMPLES / "openai_agent.py"

console = Console()


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


def run(settings: Settings, report: Path | None) -> bool:
    """Run the demo, print its table, write ``report``. Returns whether the agent was restored and went on unchanged."""
    if not EXAMPLE.exists():
        raise SettingsError("`agentstate demo` runs the examples: start it in a checkout of the project")
    python = launcher.engine_python(settings)
    checkpoint = settings.cache_dir / "smollm2-135m-instruct"
    if not (checkpoint / "config.json").exists():
        console.print("[bold]Preparing SmolLM2-135M-Instruct[/] (once, about a minute)")
        if subprocess.run([python, "-m", "engine_patch.cpu.smollm2", str(checkpoint)], check=False).returncode:
            raise EngineError("the model could not be prepared; the lines above say why")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that child processes are ended too
    home = settings.home / "demo"
    shutil.rmtree(home, ignore_errors=True)  # the last run's pages and sessions
    stack = LocalStack(
        home,
        checkpoint,
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
        with _step("starting the service and the engine (SGLang on this machine)"):
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
        with _step("kill -9 the engine, and start it again"):
            self._stack.kill_engine()
            self._stack.start_engine()
        console.print("\n[bold]The agent resumes[/], in a new process, on the new engine")
        after = self._agent("agent", "conclude")
        turn = after["turns"][0]
        console.print("\n[bold]The agent on the plain OpenAI client[/] goes on")
        self._plain_agent("And an extent?")
        with _step(f"measuring: {PAIRS} × restored and memory hit in turn, then recomputed"):
            restored, hits, recomputed, n_bytes, seconds = self._measure(after["messages"][:-2])
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
        )

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
        """Run the example agent as a process. Returns its report."""
        report = self._scratch / f"{name}.json"
        session = f"{name}-{self._run}"
        arguments = ["--session", session, "--cache-salt", session, "--steps", steps, "--report", str(report)]
        arguments += ["--service", self._stack.service_url, "--model", self._stack.model]
        command = [sys.executable, str(EXAMPLE), *arguments]
        if subprocess.run(command, env=dict(self._stack.environment), check=False).returncode:
            raise EngineError(f"the agent {name} failed; the lines above say why")
        return dict(json.loads(report.read_text()))

    def _plain_agent(self, question: str) -> None:
        """Run the agent that knows only a base URL, as a process."""
        own = {"OPENAI_BASE_URL": f"{self._stack.service_url}/v1", "OPENAI_API_KEY": "none"}
        command = [sys.executable, str(PLAIN_EXAMPLE), str(self._scratch / "plain.json"), question]
        if subprocess.run(command, env={**self._stack.environment, **own}, check=False).returncode:
            raise EngineError("the agent on the plain client failed; the lines above say why")

    def _ask(self, history: list[dict[str, Any]], question: str, salt: str) -> float:
        """Seconds to the first token of a question asked after ``history``, in the KV namespace ``salt``."""
        body = {
            "model": self._stack.model,
            "messages": [*history, {"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 2,
            "stream": True,
            "cache_salt": salt,
        }
        url = f"{self._stack.engine_url}/v1/chat/completions"
        started, first = time.perf_counter(), None
        with httpx.stream("POST", url, json=body, timeout=600) as response:
            # Read to the end: a request that still decodes would delay the next one.
            for line in response.iter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    first = first or time.perf_counter() - started
        if first is None:
            raise EngineError("the engine answered without a token")
        return first


def _print(figures: Figures) -> None:
    table = Table(title=f"Turn 2 of an agent with a context of {figures.context_tokens:,} tokens")
    table.add_column("time to first token")
    table.add_column("s", justify="right")
    table.add_column("÷ memory hit", justify="right")
    table.add_column("recomputed ÷", justify="right")
    for label, seconds in {
        "recomputed (no AgentState)": figures.ttft_recomputed_s,
        "restored from disk, first request after the restart": figures.ttft_after_restart_s,
        f"restored from disk (median of {PAIRS})": figures.ttft_restored_s,
        f"memory hit, the floor (median of {PAIRS})": figures.ttft_memory_hit_s,
    }.items():
        table.add_row(
            label,
            f"{seconds:.3f}",
            f"{seconds / figures.ttft_memory_hit_s:.2f}",
            f"{figures.ttft_recomputed_s / seconds:.1f}×",
        )
    console.print()
    console.print(table)
    console.print(
        f"restored {figures.tokens_restored:,} tokens, {figures.bytes_read:,} bytes at {figures.restore_gb_per_s} GB/s "
        f"while the forward ran; covers the whole page-aligned prefix: {'yes' if figures.covered else 'NO'}; "
        f"same tokens as the agent that was never suspended: {'yes' if figures.identical else 'NO'}"
    )


@contextmanager
def _step(what: str) -> Iterator[None]:
    """Show the name of a long step, with a running clock."""
    with Progress(SpinnerColumn(), TextColumn(what), TimeElapsedColumn(), console=console) as progress:
        progress.add_task(what, total=None)
        yield
