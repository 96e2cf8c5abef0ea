"""Python programs that start at once: what they import is imported one time, and every program is a fork.

`Zygotes` starts programs like `agentstate.cli.local.spawn` does, from a command and an environment. The first command
with an environment starts a zygote for it: a process that imports `MODULES` and forks a child for each command. A child
is a process like any other: it leads a session, has the environment, the log and the working directory that it would
have been started with, runs `python -m MODULE` to its end, and can be signalled and waited for. Two things differ from
a process that was executed: what `multiprocessing` spawns is forked as well, and the kernel kills the child when its
zygote ends. A zygote ends with the process that started it, also when that one is killed.

Run as a program, this file is the zygote. The two talk in lines of JSON over a pair of pipes. Imports nothing that the
engine's environment may lack.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

MODULES = (
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.mem_cache.unified_radix_cache",
    "sglang.srt.models.registry",
    "sglang.srt.models.llama",
    "sglang.srt.models.deepseek_v2",
    "resting",
)
"""What an engine imports before it serves, without the plug-in: an engine's own process loads that. The last one lets
an engine rest that is idle."""

_READ_LATE = ("AGENTSTATE_", "AWS_", "COLUMNS", "LINES", "PYTEST_", "PYTHONPATH")
_READ_LATE += ("SGLANG_CPU_OMP_", "SGLANG_UNIFIED_RADIX_", "SPEED", "TOLD_")
"""Beginnings of the variables that no imported module reads: commands that differ in these alone share a zygote."""

_WITHIN = ("ip", "netns", "exec")
_PR_SET_PDEATHSIG, _CLONE_NEWNET = 1, 0x40000000


class Zygotes:
    """Starts ``python -m`` commands as forks. `close` kills what still runs.

    Safe to be used by several threads.
    """

    def __init__(self, log: Path, modules: Sequence[str] = MODULES):
        self._log = log
        self._modules = modules
        self._zygotes: dict[tuple[str, frozenset[tuple[str, str]]], _Zygote] = {}
        self._lock = threading.Lock()

    def spawn(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Fork:
        """Start ``[python, "-m", module, ...]`` in this directory, its output appended to ``log``. Before it there may
        be ``ip netns exec NAME``: it runs in that network namespace."""
        namespace = command[len(_WITHIN)] if tuple(command[: len(_WITHIN)]) == _WITHIN else None
        python, option, *arguments = command if namespace is None else command[len(_WITHIN) + 1 :]
        assert option == "-m", f"a zygote runs modules, not {option}"
        imported = {name: value for name, value in environment.items() if not name.startswith(_READ_LATE)}
        with self._lock:
            key = python, frozenset(imported.items())
            if key not in self._zygotes:
                self._zygotes[key] = _Zygote(python, imported, self._log, self._modules)
        return self._zygotes[key].fork(arguments, environment, log, namespace)

    def close(self) -> None:
        for zygote in self._zygotes.values():
            zygote.close()
        self._zygotes.clear()


class Fork:
    """What `subprocess.Popen` is to a command, for a child of a zygote."""

    def __init__(self, zygote: _Zygote, pid: int):
        self.pid = pid
        self.returncode: int | None = None
        self._zygote = zygote
        self._ended = os.pidfd_open(pid)  # valid until `wait`: nobody else reaps it

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative for a signal. Raises subprocess.TimeoutExpired after ``timeout`` seconds."""
        if self.returncode is None:
            ended, _, _ = select.select([self._ended], [], [], timeout)
            if not ended:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = int(self._zygote.ask(reap=self.pid)["status"])
            os.close(self._ended)
        return self.returncode

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.returncode is None:  # until then the process id is its own
            os.kill(self.pid, number)


class _Zygote:
    """The zygote as those see it who ask it."""

    def __init__(self, python: str, environment: Mapping[str, str], log: Path, modules: Sequence[str]):
        self._lock = threading.Lock()
        self._log = log
        with log.open("ab") as output:
            # A session of its own: an interrupt from the keyboard is for who started it.
            self._process = subprocess.Popen(
                [python, __file__, str(os.getpid()), *modules],
                env={**environment, "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
                text=True,
            )

    def fork(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path, namespace: str | None) -> Fork:
        answer = self.ask(
            arguments=list(arguments),
            environment=dict(environment),
            log=str(log.absolute()),
            directory=os.getcwd(),
            namespace=namespace,
        )
        return Fork(self, int(answer["pid"]))

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the zygote has ended:\n" + self._log.read_text(errors="replace")[-4000:])
        return dict(json.loads(answer))

    def close(self) -> None:
        """Its children end with it, and their children with them."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when ``parent``, which started it, ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended meanwhile
        os._exit(1)


def _serve(requests: TextIO, answers: TextIO) -> dict[str, Any] | None:
    """Answer requests until there are no more: None. Returns in every child as well: with what was asked for."""
    own = os.getpid()
    for line in iter(requests.readline, ""):
        request = json.loads(line)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)
            answer = {"status": os.waitstatus_to_exitcode(status)}
        else:
            answer = {"pid": os.fork()}
            if answer["pid"] == 0:
                _die_with(own)
                requests.close()
                answers.close()
                return dict(request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return None


def _become(request: dict[str, Any], imported: Mapping[str, str]) -> None:
    """Make this process what the requested command would have started, and run it. ``imported`` are the variables that
    the modules have set."""
    os.setsid()
    if request["namespace"] is not None:
        with open(f"/run/netns/{request['namespace']}") as network:
            if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "the network namespace cannot be entered", network.name)
    os.chdir(request["directory"])
    output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.environ.clear()
    os.environ.update({**request["environment"], **imported})
    module, *arguments = request["arguments"]
    sys.path[:1] = [request["directory"], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [module, *arguments]
    # A spawned child would import everything again.
    from multiprocessing import context

    context._concrete_contexts["spawn"] = context._concrete_contexts["fork"]  # type: ignore[attr-defined]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    _die_with(int(sys.argv[1]))
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    before = dict(os.environ)
    for module in sys.argv[2:]:
        importlib.import_module(module)
    imported = {name: value for name, value in os.environ.items() if before.get(name) != value}
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads run after the imports: a fork would have one of them"
    gc.collect()
    gc.freeze()  # pages of memory stay shared with the children
    if (request := _serve(requests, answers)) is not None:
        _become(request, imported)


if __name__ == "__main__":
    main()
