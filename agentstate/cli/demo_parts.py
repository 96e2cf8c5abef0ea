"""What the demos are made of: a model, the example's agent as a process, and the time to a first token."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from agentstate.cli import launcher
from agentstate.cli.local import LocalService, LocalStack
from agentstate.errors import EngineError, SettingsError
from agentstate.settings import Settings

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_AGENT = EXAMPLES / "openai_loop.py"

console = Console()


def checkpoint(settings: Settings) -> Path:
    """The directory of SmolLM2-135M-Instruct, which is prepared if it is not there. From now on SIGTERM ends this
    process as an exception does, so that its child processes are ended too."""
    if not _AGENT.exists():
        raise SettingsError("`agentstate demo` runs the examples: start it in a checkout of the project")
    python = launcher.engine_python(settings)
    model = settings.cache_dir / "smollm2-135m-instruct"
    if not (model / "config.json").exists():
        console.print("[bold]Preparing SmolLM2-135M-Instruct[/] (once, about a minute)")
        if subprocess.run([python, "-m", "engine_patch.cpu.smollm2", str(model)], check=False).returncode:
            raise EngineError("the model could not be prepared; the lines above say why")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    return model


@contextmanager
def step(what: str) -> Iterator[None]:
    """Show the name of a long step, with a running clock."""
    with Progress(SpinnerColumn(), TextColumn(what), TimeElapsedColumn(), console=console) as progress:
        progress.add_task(what, total=None)
        yield


def run_agent(service: LocalService, session: str, steps: str, report: Path) -> dict[str, Any]:
    """Run the example's agent as a process, with a KV namespace that is named like its session. Returns its report."""
    arguments = ["--session", session, "--cache-salt", session, "--steps", steps, "--report", str(report)]
    arguments += ["--service", service.service_url, "--model", LocalStack.model]
    command = [sys.executable, str(_AGENT), *arguments]
    if subprocess.run(command, env=dict(service.environment), check=False).returncode:
        raise EngineError(f"the agent of session {session} failed; the lines above say why")
    return dict(json.loads(report.read_text()))


def first_token(
    stack: LocalStack, history: list[dict[str, Any]], question: str, more: Mapping[str, Any]
) -> tuple[float, int]:
    """Ask the engine a question after ``history``, with ``more`` in the request's body: seconds to the first token, and
    how many tokens of the prompt were not computed."""
    body = {
        "model": stack.model,
        "messages": [*history, {"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }
    url = f"{stack.engine_url}/v1/chat/completions"
    started, first, cached = time.perf_counter(), None, 0
    with httpx.stream("POST", url, json=body, timeout=600) as response:
        # Read to the end: a request that still decodes would delay the next one.
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                first = first or time.perf_counter() - started
            if usage := event.get("usage"):
                cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    if first is None:
        raise EngineError("the engine answered without a token")
    return first, cached


def print_times(title: str, seconds: Mapping[str, float], *, hit_s: float, recomputed_s: float) -> None:
    """Print times to first token by what they are of, and what they are of a memory hit and of recomputing."""
    table = Table(title=title)
    table.add_column("time to first token")
    for name in ("s", "÷ memory hit", "recomputed ÷"):
        table.add_column(name, justify="right")
    for label, ttft_s in seconds.items():
        table.add_row(label, f"{ttft_s:.3f}", f"{ttft_s / hit_s:.2f}", f"{recomputed_s / ttft_s:.1f}×")
    console.print()
    console.print(table)
