"""Several processes that answer requests at one address: what is behind ``agentstate serve --workers``.

One process listens and starts the workers, which accept from the same socket; it starts each one again that dies, and
answers nothing itself. So it stays as it was when the first worker was forked from it: without threads, connections and
locks that would be copied half-way. What is to be done once a service is done by the first worker. If that dies, its
successor goes on: another worker would only die of the same.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from agentstate.api.limits import Limits
from agentstate.api.metrics import count_in
from agentstate.errors import AgentStateError, SettingsError
from agentstate.fleet import passing

logger = logging.getLogger(__name__)

# A worker that has lived for less than this is not started again at once, but after a time that doubles.
SHORT_S = 10.0
FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 5.0
# How the parent, and it its workers, are told to stop.
_TOLD = (signal.SIGTERM, signal.SIGINT)
# The exit status of a worker that could not start.
FAILED = 3


@dataclass(frozen=True)
class Worker:
    """One of the processes, and what it shares with the others: ``limits``, the directory in which all count, and the
    sockets through which notes about waits reach the first one."""

    number: int  # from 1 on; a successor has the same
    limits: Limits
    metrics_dir: Path
    notes_in: socket.socket
    notes_out: socket.socket
    _starts: Any

    @property
    def is_first(self) -> bool:
        return self.number == 1

    def started(self) -> None:
        """It answers requests from now on."""
        self._starts[self.number - 1] = 1


class Supervisor:
    """Runs ``serve`` in ``count`` processes. It is to return when the process is told to stop (SIGTERM, SIGINT).
    ``listener`` is what they accept from: once they stop, nobody is kept waiting there."""

    def __init__(self, count: int, serve: Callable[[Worker], None], listener: socket.socket):
        self._count = count
        self._serve = serve
        self._listener = listener
        self._fork = multiprocessing.get_context("fork")
        self._starts = self._fork.RawArray("b", count)
        self._limits = Limits(count)
        self._notes = passing.pair()
        self._stopping = False
        self._running: dict[int, Any] = {}
        self._begun_s: dict[int, float] = {}
        self._delay_s: dict[int, float] = {}
        self._due_s: dict[int, float] = {}

    def run(self) -> None:
        """Until this process is told to stop, and all workers have. Raises SettingsError if no worker can start."""
        self._metrics_dir = Path(tempfile.mkdtemp(prefix="agentstate-metrics-"))
        # A worker reads to the end of this pipe, which comes when this process is gone, however it ended.
        self._alive_out, self._alive_in = os.pipe()
        woken, wake = socket.socketpair()
        for end in (woken, wake):
            end.setblocking(False)
        handlers = {number: signal.signal(number, self._stop) for number in _TOLD}
        before = signal.set_wakeup_fd(wake.fileno())
        try:
            self._due_s = dict.fromkeys(range(1, self._count + 1), 0.0)
            self._watch(woken)
        finally:
            signal.set_wakeup_fd(before)
            for process in self._running.values():
                process.kill()
                process.join()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.close(self._alive_in)
            os.close(self._alive_out)
            for end in (woken, wake, *self._notes):
                end.close()
            shutil.rmtree(self._metrics_dir, ignore_errors=True)

    def _watch(self, woken: socket.socket) -> None:
        while self._running or not self._stopping:
            timeout_s = None
            if not self._stopping:
                now_s = time.monotonic()
                for number in [number for number, due_s in self._due_s.items() if due_s <= now_s]:
                    self._start(number)
                if self._due_s:
                    timeout_s = max(0.0, min(self._due_s.values()) - time.monotonic())
            connection.wait([woken, *(process.sentinel for process in self._running.values())], timeout_s)
            with suppress(BlockingIOError):
                woken.recv(1024)
            if self._stopping:
                self._listener.close()
                self._tell_all(signal.SIGTERM)
            for number, process in list(self._running.items()):
                if process.exitcode is not None:
                    self._over(number)

    def _start(self, number: int) -> None:
        del self._due_s[number]
        process = self._fork.Process(target=self._work, args=(number,), name=f"agentstate-worker-{number}")
        self._begun_s[number] = time.monotonic()
        # A signal that comes meanwhile waits until the worker has handlers of its own.
        signal.pthread_sigmask(signal.SIG_BLOCK, _TOLD)
        try:
            process.start()
        except OSError as error:
            # There is no memory, or no process, to be had now. The other workers go on.
            if error.errno not in (errno.EAGAIN, errno.ENOMEM):
                raise
            logger.error("worker %d is not started for now: %s", number, error.strerror)
            self._start_again(number)
        else:
            self._running[number] = process
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _TOLD)

    def _over(self, number: int) -> None:
        process = self._running.pop(number)
        process.join()
        if self._stopping:
            return
        if process.exitcode == FAILED and not any(self._starts):
            self._stopping = True
            self._tell_all(signal.SIGTERM)
            for other in self._running.values():
                other.join()
            self._running.clear()
            raise SettingsError("no worker of the service could start: its log says why")
        self._start_again(number)
        logger.error(
            "worker %d (process %d) ended with %s and is started again", number, process.pid, _said(process.exitcode)
        )

    def _start_again(self, number: int) -> None:
        lived_s = time.monotonic() - self._begun_s[number]
        delay_s = 0.0
        if lived_s < SHORT_S:
            delay_s = min(LONGEST_DELAY_S, max(FIRST_DELAY_S, 2 * self._delay_s.get(number, 0.0)))
        self._delay_s[number] = delay_s
        self._due_s[number] = time.monotonic() + delay_s

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _tell_all(self, number: signal.Signals) -> None:
        for process in self._running.values():
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    # --- in a worker

    def _work(self, number: int) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _TOLD)
        os.close(self._alive_in)
        gone = (self._alive_out, self._metrics_dir)
        threading.Thread(target=_end_after, args=gone, name="agentstate-parent", daemon=True).start()
        count_in(self._metrics_dir, number)
        self._limits.join(number)
        worker = Worker(number, self._limits, self._metrics_dir, *self._notes, self._starts)
        try:
            self._serve(worker)
        except KeyboardInterrupt:
            return
        except AgentStateError as error:
            logger.error("worker %d cannot start: %s", number, error)
            sys.exit(FAILED)
        if not self._starts[number - 1]:
            sys.exit(FAILED)


def _end_after(parent: int, metrics_dir: Path) -> None:
    """Stop this process once its parent is gone: nobody would start what dies, stop what runs, or tidy up."""
    os.read(parent, 1)
    shutil.rmtree(metrics_dir, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _said(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"
