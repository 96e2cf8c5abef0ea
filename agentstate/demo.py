"""`agentstate demo`: an agent works, is suspended, its engine is killed, and it goes on from its pages on disk.

Everything in it is what a user runs: SGLang with the plug-in, `agentstate serve`, and the agent of
`examples/openai_loop.py`, each a process of its own. A second agent that does the same work and is never suspended
says what the first one's continuation must be, token for token.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from agentstate import engines, launcher
from agentstate.control import ControlClient
from agentstate.database import Database
from agentstate.errors import EngineError, SettingsError
from agentstate.settings import Settings

MODEL = "smollm2"
ENGINE_PORT, SERVICE_PORT = 30701, 8701
PAIRS = 5
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "openai_loop.py"

console = Console()


@dataclass(frozen=True)
class Figures:
    """What the demo found. Times are client-side, from sending a request to its first token, medians where measured
    more than once; ``ttft_after_restart_s`` is the restarted engine's first request with this context."""

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
    """Run the demo, print its table, write ``report``: whether the agent was restored and went on unchanged."""
    if not EXAMPLE.exists():
        raise SettingsError("`agentstate demo` runs the examples: start it in a checkout of the project")
    python = launcher.engine_python(settings)
    checkpoint = settings.cache_dir / "smollm2-135m-instruct"
    if not (checkpoint / "config.json").exists():
        console.print("[bold]Preparing SmolLM2-135M-Instruct[/] (once, about a minute)")
        if subprocess.run([python, "-m", "engine_patch.cpu.smollm2", str(checkpoint)], check=False).returncode:
            raise EngineError("the model could not be prepared; the lines above say why")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended then too
    with tempfile.TemporaryDirectory(prefix="agentstate-demo-") as scratch, ExitStack() as stack:
        stage = _Stage(Path(scratch), checkpoint, settings)
        stack.callback(stage.close)
        figures = _play(stage)
    _print(figures)
    if report is not None:
        report.write_text(json.dumps(asdict(figures), indent=2) + "\n")
        console.print(f"Figures written to {report}")
    return figures.covered and figures.identical


def _play(stage: _Stage) -> Figures:
    with _step("starting the service and the engine (SGLang on this machine)"):
        stage.start_service()
        stage.start_engine()
    console.print("\n[bold]An agent that is never suspended[/], to compare with")
    control = stage.agent("control", "survey,conclude")
    console.print("\n[bold]The agent[/]")
    before = stage.agent("agent", "survey")
    if before["kv"]["state"] != "durable":
        raise EngineError(f"the agent's KV is {before['kv']['state']}, not durable")
    with _step("kill -9 the engine, and start it again"):
        stage.kill_engine()
        stage.start_engine()
    console.print("\n[bold]The agent resumes[/], in a new process, on the new engine")
    after = stage.agent("agent", "conclude")
    turn = after["turns"][0]
    history = after["messages"][:-2]
    with _step(f"measuring: {PAIRS} × restored and memory hit in turn, then recomputed"):
        restored, hits, n_bytes, seconds = [], [], [], []
        for i in range(PAIRS):
            stage.flush_device()
            earlier = stage.restored()
            restored.append(stage.ask(history, f"{2 * i}. What did you read?"))
            later = stage.restored()
            n_bytes.append(later["bytes_read"] - earlier["bytes_read"])
            seconds.append(later["seconds"] - earlier["seconds"])
            hits.append(stage.ask(history, f"{2 * i + 1}. What did you read?"))
        recomputed = stage.ask(history, "0. What did you read?", salt=uuid.uuid4().hex)
    return Figures(
        context_tokens=turn["prompt_tokens"],
        tokens_restored=turn["cached_tokens"],
        bytes_read=int(statistics.median(n_bytes)),
        restore_gb_per_s=round(sum(n_bytes) / sum(seconds) / 1e9, 2),
        ttft_recomputed_s=round(recomputed, 3),
        ttft_restored_s=round(statistics.median(restored), 3),
        ttft_memory_hit_s=round(statistics.median(hits), 3),
        ttft_after_restart_s=round(turn["ttft_s"], 3),
        covered=turn["cached_tokens"] == before["kv"]["tokens"] > 0,
        identical=turn["text"] == control["turns"][-1]["text"],
    )


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
    """Name what takes long, with a running clock."""
    with Progress(SpinnerColumn(), TextColumn(what), TimeElapsedColumn(), console=console) as progress:
        progress.add_task(what, total=None)
        yield


class _Stage:
    """The processes of one run, in directories of its own; `close` ends those it started."""

    def __init__(self, scratch: Path, checkpoint: Path, settings: Settings):
        self._scratch = scratch
        self._checkpoint = checkpoint
        self._run = uuid.uuid4().hex[:8]
        self._engine: subprocess.Popen[bytes] | None = None
        self._service: subprocess.Popen[bytes] | None = None
        home = settings.home / "demo"
        home.mkdir(parents=True, exist_ok=True)
        values = {"home": home, "engine_python": settings.engine_python, "port": SERVICE_PORT}
        self._settings = Settings(**{name: value for name, value in values.items() if value is not None})
        self._environment = {
            **os.environ,
            "AGENTSTATE_HOME": str(home),
            "AGENTSTATE_PORT": str(SERVICE_PORT),
            "HF_HUB_OFFLINE": "1",
        }
        for name in ("AGENTSTATE_DATABASE_URL", "AGENTSTATE_PAGES_DIR"):
            self._environment.pop(name, None)
        self._service_url = f"http://127.0.0.1:{SERVICE_PORT}"
        self._engine_url = f"http://127.0.0.1:{ENGINE_PORT}"

    def start_service(self) -> None:
        launcher.require_free_port("127.0.0.1", SERVICE_PORT)
        self._service = self._spawn([sys.executable, "-m", "agentstate.cli", "serve"], self._environment, "service.log")
        self._await(self._service, f"{self._service_url}/healthz", "service.log", 30)

    def start_engine(self) -> None:
        """Start SGLang and wait until it answers and has told the service that it is there."""
        arguments = ["--model-path", str(self._checkpoint), "--served-model-name", MODEL]
        arguments += ["--host", "127.0.0.1", "--port", str(ENGINE_PORT), "--max-total-tokens", "32768"]
        command, environment = launcher.engine_command(self._settings, arguments)
        self._engine = self._spawn(command, {**environment, **self._environment}, "engine.log")
        self._await(self._engine, f"{self._engine_url}/health", "engine.log", 300)
        deadline = time.monotonic() + 30
        while self._stat() is None:
            if time.monotonic() > deadline:
                raise EngineError("the engine runs and did not register itself with the service")
            time.sleep(0.1)

    def kill_engine(self) -> None:
        """SIGKILL, to the engine and everything it started: nothing can be written any more."""
        if self._engine is not None:
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(self._engine.pid, signal.SIGKILL)
            self._engine.wait()
            self._engine = None

    def agent(self, name: str, steps: str) -> dict[str, Any]:
        """Run the example agent as a process: its report. Every agent and every run has a KV namespace of its own."""
        report = self._scratch / f"{name}.json"
        session = f"{name}-{self._run}"
        arguments = ["--session", session, "--cache-salt", session, "--steps", steps, "--service", self._service_url]
        command = [sys.executable, str(EXAMPLE), *arguments, "--model", MODEL, "--report", str(report)]
        if subprocess.run(command, env=self._environment, check=False).returncode:
            raise EngineError(f"the agent {name} failed; the lines above say why")
        return dict(json.loads(report.read_text()))

    def ask(self, history: list[dict[str, Any]], question: str, salt: str | None = None) -> float:
        """Seconds to the first token of a question put after ``history``."""
        body = {
            "model": MODEL,
            "messages": [*history, {"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 4,
            "stream": True,
            "cache_salt": salt or f"agent-{self._run}",
        }
        started = time.perf_counter()
        with httpx.stream("POST", f"{self._engine_url}/v1/chat/completions", json=body, timeout=600) as response:
            for line in response.iter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    return time.perf_counter() - started
        raise EngineError("the engine answered without a token")

    def flush_device(self) -> None:
        """Empty the device's cache, so that the next request has to restore. Retries while a request winds up."""
        for _ in range(50):
            if httpx.post(f"{self._engine_url}/flush_cache", timeout=60).is_success:
                return
            time.sleep(0.1)
        raise EngineError("the engine's cache could not be flushed")

    def restored(self) -> dict[str, Any]:
        """The engine's restore counters."""
        stat = self._stat()
        if stat is None:
            raise EngineError("the engine does not answer at its control endpoint")
        return dict(stat["restore"])

    def close(self) -> None:
        self.kill_engine()
        if self._service is not None:
            self._service.terminate()
            self._service.wait()

    def _stat(self) -> dict[str, Any] | None:
        """What the registered engine says of itself; None while none answers, as one that was killed does not."""
        database = Database(self._settings.sqlalchemy_url)
        try:
            with database.read() as connection:
                found = engines.live(connection, self._settings.engine_timeout_s, MODEL)
        finally:
            database.close()
        for engine in found:
            try:
                return ControlClient(engine.control_address).call("stat", 1)
            except EngineError:
                continue
        return None

    def _spawn(self, command: list[str], environment: dict[str, str], log: str) -> subprocess.Popen[bytes]:
        with (self._scratch / log).open("ab") as output:
            # A session of its own: the engine is several processes, and all of them are killed at once.
            return subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _await(self, process: subprocess.Popen[bytes], url: str, log: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                if httpx.get(url, timeout=2).is_success:
                    return
            except httpx.TransportError:
                pass
            if process.poll() is not None:
                break
            time.sleep(0.2)
        tail = (self._scratch / log).read_text(errors="replace").splitlines()[-15:]
        raise EngineError(f"{url} does not answer; the end of {log}:\n" + "\n".join(tail))
