"""The stacks that `agentstate bench` measures: the model prepared, the engine started, progress shown."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from agentstate.benchmarks import drafting
from agentstate.benchmarks.models import GEOMETRIES
from agentstate.benchmarks.terminal import console
from agentstate.cli import launcher
from agentstate.cli.local import LocalStack, free_port
from agentstate.errors import EngineError, EngineUnreachable, SettingsError
from agentstate.fleet.control import ControlClient
from agentstate.settings import Settings

SMOLLM2 = "smollm2-135m-instruct"
TINY = {f"tiny-{kind}": kind for kind in drafting.KINDS}
"""The tiny models by their names."""
_PATIENCE_S = 120.0


@contextmanager
def running(
    settings: Settings,
    model: str,
    arguments: Sequence[str],
    *,
    stores: bool = True,
    start: bool = True,
    beside: LocalStack | None = None,
    **environment: str,
) -> Iterator[LocalStack]:
    """A stack that serves ``model`` from an empty directory, or SGLang alone unless it ``stores``. ``arguments`` are
    SGLang's. Unless told to ``start``, its engine is only ready to be started with them. It has no service if it is
    another node ``beside`` one that has. ``environment`` is added to its own. Raises SettingsError for an unknown
    model."""
    checkpoint = checkpoint_of(settings, model)
    with tempfile.TemporaryDirectory(dir=settings.cache_dir, prefix="bench-") as home:
        stack = LocalStack(
            Path(home),
            checkpoint,
            engine_python=settings.engine_python,
            service_port=free_port(),
            engine_port=free_port(),
            stores=stores,
            beside=beside,
        )
        stack.environment = {**stack.environment, **environment}
        with closing(stack):
            with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as progress:
                progress.add_task("starting the engine" if stores else "starting SGLang as it is", total=None)
                if stores and beside is None:
                    stack.start_service()
                stack.engine_arguments = tuple(arguments)
                if start:
                    stack.start_engine(*arguments)
            yield stack


def controls(stack: LocalStack, ranks: int) -> list[ControlClient]:
    """The control endpoints of an engine of so many ranks, once all answer. What a killed one has left is replaced when
    its successor registers. Raises EngineError for an engine that has ended."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        found = [ControlClient(rank.control_address, rank.control_secret) for rank in stack.ranks()]
        with suppress(EngineUnreachable):
            if len(found) == ranks and all(rank.call("stat", 10) for rank in found):
                return found
        if time.monotonic() > deadline_s:
            raise EngineError(f"{len(found)} of the engine's {ranks} rank(s) are there, or not all answer")
        time.sleep(0.1)


def settle(stack: LocalStack, ranks: int) -> None:
    """Wait until each rank has stored what it was offered."""
    for rank in controls(stack, ranks):
        while rank.call("stat", 60)["spill"]["waiting"]:
            time.sleep(0.02)


def extents_of(stack: LocalStack) -> list[Path]:
    """The files that the KV of a stack's engine lies in."""
    return sorted(stack.home.glob("pages/*/rank0/extents/*.ext"))


def checkpoint_of(settings: Settings, model: str) -> Path:
    """The directory of a model, which is made if it does not exist. Raises SettingsError for an unknown one."""
    checkpoint = settings.cache_dir / model
    if (checkpoint / "config.json").exists():
        return checkpoint
    python = launcher.engine_python(settings)
    if model == SMOLLM2:
        command = [python, "-m", "engine_patch.cpu.smollm2", str(checkpoint)]
    elif model in GEOMETRIES:
        command = [python, "-m", "agentstate.benchmarks.models", model, str(checkpoint)]
    elif model in TINY:
        command = [python, "-m", "agentstate.benchmarks.drafting", TINY[model], str(checkpoint)]
    else:
        raise SettingsError(f"there is no model {model}: choose {', '.join([SMOLLM2, *GEOMETRIES])}")
    console.print(f"preparing {model} (once)")
    if subprocess.run(command, check=False).returncode:
        raise EngineError("the model could not be prepared; the lines above say why")
    return checkpoint


@contextmanager
def steps(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Two functions: one names the step that is being done, the other says that one is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda text: progress.update(task, description=text), lambda: progress.advance(task)
