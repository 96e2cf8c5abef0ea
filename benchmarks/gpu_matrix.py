"""Everything that one GPU can show: `python -m agentstate.benchmarks.gpu_matrix DIRECTORY [--json PATH]`, in a
checkout, with the interpreter that has SGLang.

First `tests/gpu`, the pieces below SGLang. Then an engine for each of `CASES`, on tiny random models, four at a time:
agents whose KV has left the device must go on with the tokens, and the verifications of drafts, of agents that were
never suspended, and all of their KV must have been restored. It takes ten minutes at most: what has not begun after
nine is not run, and the table says so. Tensor and data parallelism and PD disaggregation
need two GPUs: they are not here.

Without a GPU, `tests/gpu` runs on the late device and nothing else does; `--on-cpu` runs the cases that a CPU can
serve, which tells whether this program works. It has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any

from rich.table import Table
from rich.text import Text

from agentstate.benchmarks import results
from agentstate.benchmarks.models import GEOMETRIES
from agentstate.benchmarks.resumed import Event, Ours, resume
from agentstate.benchmarks.speculation import ALGORITHMS, POOLS, STATES
from agentstate.benchmarks.stacks import TINY, checkpoint_of
from agentstate.benchmarks.terminal import console
from agentstate.cli import launcher
from agentstate.cli.local import LocalStack, Spawn, free_port, spawn
from agentstate.settings import Settings

# Imported as a part of agentstate, this file is behind a link.
_ROOT = Path(__file__).resolve().parents[1]
_AGENTS = 2
_LAST_S = 60
_TESTS = "tests/gpu"
# Tiny models have heads of a size that other backends lack; on a GPU only, a CPU has its own.
_TRITON = ("--attention-backend", "triton")
# No graphs: capturing them takes longer than all the rest of a case.
_QUICK = ("--disable-cuda-graph",)
_ONCE, _TWICE = (Event.FLUSH,), (Event.FLUSH, Event.KILL)


@dataclass(frozen=True)
class Case:
    """An engine: its ``model``, one of `stacks.checkpoint_of` or a kind of tests/models.py, SGLang's ``flags`` and an
    ``algorithm`` of `ALGORITHMS` if it drafts. ``on_gpu`` are flags for a GPU alone, ``on_a_cpu`` those for a CPU; one
    that no CPU can serve has ``on_cpu`` unset. ``fields`` are of each request.
    ``rare`` is what most GPUs lack: without it the case is not a failure."""

    model: str
    flags: tuple[str, ...] = ()
    algorithm: str | None = None
    on_gpu: tuple[str, ...] = (*_TRITON, *_QUICK)
    on_cpu: bool = True
    on_a_cpu: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    events: tuple[Event, ...] = _ONCE
    rare: str | None = None


_ADAPTER, _LOADED = "adapter-1", "one={adapter}"
_LORA = ("--enable-lora", "--lora-paths", _LOADED, "--max-loras-per-batch", "2")
CASES = {
    # As an operator starts it: SGLang's own attention, and graphs.
    "as it comes": Case("qwen2.5-7b", on_gpu=(), events=_TWICE, on_cpu=False),
    "GQA": Case("llama", events=_TWICE),
    **{f"pages of {size}": Case("llama", ("--page-size", str(size))) for size in (1, 16, 32, 128)},
    "fp8": Case("llama", ("--kv-cache-dtype", "fp8_e4m3")),
    **{
        name: Case("qwen2.5-7b", ("--kv-cache-dtype", dtype), on_gpu=_QUICK, on_cpu=False, rare="Blackwell")
        for name, dtype in {"fp4": "nvfp4", "mxfp8": "mxfp8"}.items()
    },
    "MLA": Case("mla"),
    "sparse attention": Case("tiny-sparse", on_gpu=_QUICK, rare="kernels for DeepSeek-V3.2"),
    "sliding windows": Case("sliding"),
    "convolutions": Case("conv", STATES),
    "recurrent states": Case("tiny-linear", STATES),
    **{name: Case(of.model, algorithm=name, events=_TWICE) for name, of in ALGORITHMS.items() if name != "mtp-sparse"},
    "mtp-sparse": Case("tiny-sparse", algorithm="mtp-sparse", on_gpu=_QUICK, rare="kernels for DeepSeek-V3.2"),
    "LoRA": Case("llama", _LORA, on_a_cpu=("--lora-backend", "torch_native"), fields={"lora_path": "one"}),
    "host memory": Case("llama", environment={"AGENTSTATE_HOST_BYTES": "256MiB"}),
    "preloads": Case("llama", environment={"AGENTSTATE_PRELOAD_BYTES": "1"}),
    "overlap off": Case("llama", ("--disable-overlap-schedule",)),
    "priorities": Case("llama", ("--enable-priority-scheduling", "--radix-eviction-policy", "priority")),
    "GPUDirect Storage": Case("llama", environment={"AGENTSTATE_READ_BACKEND": "kvikio"}, on_cpu=False, rare="KvikIO"),
}


def run(
    case: Case,
    home: Path,
    checkpoints: Path,
    *,
    on_gpu: bool,
    spawn_engine: Spawn = spawn,
    limit_s: float = 3600,
) -> dict[str, Any]:
    """Start the case's engine below ``home``, and have agents go on there. ``checkpoints`` has what `make` made. After
    ``limit_s`` the engine is killed.

    Returns a row: ``found`` is "same" if all went on with what was restored, "recomputed" if some had to compute anew,
    "OTHER TOKENS", or "did not run" with a ``reason``.
    """
    began_s = time.monotonic()
    settings = Settings()
    row: dict[str, Any] = {"found": "same", "restored_tokens": 0, "whole_tokens": 0, "reason": None}
    try:
        stack = LocalStack(
            home,
            _checkpoint(case.model, checkpoints, settings),
            engine_python=Path(sys.executable) if settings.engine_python is None else settings.engine_python,
            service_port=free_port(),
            engine_port=free_port(),
            spawn_engine=spawn_engine,
        )
        own = {"AGENTSTATE_BREAK_EVEN": "off", "AGENTSTATE_FORESIGHT": "off", **case.environment}
        stack.environment = {**stack.environment, **own}
        with closing(stack), ExitStack() as ending:
            stack.create_database()
            stack.engine_arguments = flags_of(case, checkpoints, settings, on_gpu)
            engine = Ours(stack)
            limit = Timer(limit_s, stack.kill_engine)
            limit.daemon = True
            limit.start()
            ending.callback(limit.cancel)
            engine.start()
            warm = case.algorithm is not None and not ALGORITHMS[case.algorithm].keeps
            for event in case.events:
                for pair in asyncio.run(resume(engine, event, _AGENTS, warm=warm, fields=case.fields)):
                    row["restored_tokens"] += pair.resumed.restored_tokens
                    row["whole_tokens"] += pair.never_evicted.device_tokens
                    if not pair.same:
                        row |= {"found": "OTHER TOKENS", "reason": f"after {event}"}
                    elif not pair.whole and row["found"] == "same":
                        row |= {"found": "recomputed", "reason": f"after {event}"}
    except Exception as error:  # whatever becomes of one case, the others are run
        reason = str(error) or repr(error)
        row |= (
            {"found": "did not run", "reason": reason}
            if row["found"] == "same"
            else {"reason": f"{row['reason']}; then {reason}"}
        )
    return {**row, "seconds": round(time.monotonic() - began_s, 1)}


def make(cases: Iterable[Case], checkpoints: Path) -> None:
    """Make the models of cases: those of tests/models.py below ``checkpoints``, with an adapter. Raises
    subprocess.CalledProcessError."""
    chosen, settings = list(cases), Settings()
    kinds = sorted({case.model for case in chosen if not _is_cached(case.model)})
    if kinds:
        subprocess.run(
            [sys.executable, _ROOT / "tests" / "models.py", checkpoints, *kinds, _ADAPTER], check=True, cwd=_ROOT
        )
    for case in chosen:
        _checkpoint(case.model, checkpoints, settings)
        flags_of(case, checkpoints, settings, on_gpu=False)


def _is_cached(model: str) -> bool:
    return model in TINY or model in GEOMETRIES


def _checkpoint(model: str, checkpoints: Path, settings: Settings) -> Path:
    return checkpoint_of(settings, model) if _is_cached(model) else checkpoints / model


def flags_of(case: Case, checkpoints: Path, settings: Settings, on_gpu: bool) -> tuple[str, ...]:
    """SGLang's, with the checkpoints of an adapter and of a draft model, which is made if it does not exist."""
    flags = tuple(flag.format(adapter=checkpoints / _ADAPTER) if flag == _LOADED else flag for flag in case.flags)
    if case.algorithm is not None:
        flags += ALGORITHMS[case.algorithm].arguments(settings)
    if not on_gpu:
        return ("--dtype", "float32", *POOLS, *flags, *case.on_a_cpu)
    # A GPU's kernels are made for bfloat16, and round alike for equally many tokens. Several engines share it.
    return ("--dtype", "bfloat16", *POOLS, "--mem-fraction-static", "0.5", *flags, *case.on_gpu)


def below_sglang(limit_s: float) -> dict[str, Any]:
    """A row, like `run`: `tests/gpu` on this machine's GPU, or on the late device. It is "passed" or "FAILED"."""
    began_s = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "--disable-warnings", "-p", "no:cacheprovider", _TESTS]
    try:
        ran = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        found, reason = "FAILED", str(error)
    else:
        found = "FAILED" if ran.returncode else "passed"
        reason = (ran.stdout.strip().splitlines() or ["it said nothing"])[-1]
        if ran.returncode:
            console.print(ran.stdout[-4000:] + ran.stderr[-1000:], highlight=False, markup=False)
    row = {"found": found, "restored_tokens": None, "whole_tokens": None, "reason": reason}
    return {**row, "seconds": round(time.monotonic() - began_s, 1)}


def matrix(
    cases: Mapping[str, Case], directory: Path, *, on_gpu: bool, at_once: int, minutes: float
) -> list[dict[str, Any]]:
    """A row a case, in their order. Those that have not begun after so many ``minutes`` do not run, and those that run
    have another minute."""
    deadline_s = time.monotonic() + minutes * 60

    def row(name: str, case: Case) -> dict[str, Any]:
        if time.monotonic() > deadline_s:
            found = {"found": "did not run", "restored_tokens": 0, "whole_tokens": 0, "reason": "no time was left"}
            return {"case": name, **found, "seconds": 0.0}
        home = Path(tempfile.mkdtemp(dir=directory, prefix="case-"))
        limit_s = deadline_s + _LAST_S - time.monotonic()
        found = run(case, home, checkpoints, on_gpu=on_gpu, limit_s=limit_s)
        console.print(f"{name}: {found['found']}, {found['seconds']:.0f} s", highlight=False)
        return {"case": name, **found}

    checkpoints = directory / "models"
    make(cases.values(), checkpoints)
    with ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(row, cases, cases.values()))


def failed(rows: Sequence[Mapping[str, Any]], cases: Mapping[str, Case]) -> list[str]:
    """The cases that failed: all that did not go on as they should, but for those that need what most GPUs lack."""
    return [
        row["case"]
        for row in rows
        if row["found"] not in ("same", "passed")
        and not (row["found"] == "did not run" and row["case"] in cases and cases[row["case"]].rare)
    ]


def _print(rows: Sequence[Mapping[str, Any]], cases: Mapping[str, Case]) -> None:
    table = Table("case", "found", "tokens restored", "s", "")
    for row in rows:
        rare = cases[row["case"]].rare if row["case"] in cases and row["found"] == "did not run" else None
        restored = "" if row["restored_tokens"] is None else f"{row['restored_tokens']:,} of {row['whole_tokens']:,}"
        said = (row["reason"] or "").splitlines()[0] if row["reason"] else ""
        said += f" (needs {rare})" if rare else ""
        table.add_row(row["case"], row["found"], restored, f"{row['seconds']:.0f}", Text(said))
    console.print(table)
    for row in rows:
        if row["found"] == "did not run" and "\n" in (row["reason"] or ""):
            console.print(f"{row['case']}: {row['reason']}", highlight=False, markup=False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m agentstate.benchmarks.gpu_matrix", description=__doc__.split("\n")[0]
    )
    parser.add_argument("directory", type=Path, help="an existing directory on the drive that pages are stored on")
    parser.add_argument("--only", help="some of the cases, separated by commas")
    parser.add_argument("--at-once", type=int, default=4, help="engines at a time (default: 4; 1 on a CPU)")
    parser.add_argument("--minutes", type=float, default=9, help="no case begins later than this (default: 9)")
    parser.add_argument("--on-cpu", action="store_true", help="without a GPU: run the cases that a CPU can serve")
    parser.add_argument("--json", type=Path, help="where to write the raw rows")
    given = parser.parse_args(arguments)
    on_gpu = launcher.has_cuda()
    names = list(CASES) if given.only is None else given.only.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"there is no case {unknown[0]!r}: choose {', '.join(CASES)}")
    chosen = {name: CASES[name] for name in names}
    if not on_gpu:
        console.print(f"no GPU: {_TESTS} runs on the late device, which shows the order of copies and no kernel")
        chosen = {name: case for name, case in chosen.items() if given.on_cpu and case.on_cpu}
    began_s = time.monotonic()
    rows = [{"case": _TESTS, **below_sglang(given.minutes * 60)}]
    left_min = given.minutes - (time.monotonic() - began_s) / 60
    with tempfile.TemporaryDirectory(dir=given.directory, prefix="matrix-") as place:
        at_once = given.at_once if on_gpu else 1
        rows += matrix(chosen, Path(place), on_gpu=on_gpu, at_once=at_once, minutes=left_min)
    _print(rows, chosen)
    if given.json is not None:
        settings = {"on_gpu": on_gpu, "only": given.only, "at_once": given.at_once, "minutes": given.minutes}
        results.write(given.json, results.record("gpu_matrix", settings, rows, [Path(sys.executable)]))
    if wrong := failed(rows, chosen):
        parser.exit(1, f"not as without eviction: {', '.join(wrong)}\n")


if __name__ == "__main__":
    main()
