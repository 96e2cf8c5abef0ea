"""`agentstate up`: a service and an engine on this machine, with one log, started and ended in order.

The service is started first, so that the engine finds the database; it is ended first too: requests that run are
finished while the engine still serves, and the engine then stores what it has.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from agentstate.cli import launcher
from agentstate.cli.output import visible
from agentstate.errors import SettingsError
from agentstate.settings import Settings

# What each may take to end by itself: the service ends its requests, the engine stores its pages.
_SERVICE_END_S, _ENGINE_END_S = 45.0, 180.0
_POLL_S = 0.1
_printing = threading.Lock()


def run(settings: Settings, arguments: list[str]) -> int:
    """Run both until a signal or until one of them ends. Returns 0 if a signal has ended both and each ended by itself,
    else 1. Raises like `launcher.engine_command`, before anything is started."""
    if not settings.port:
        raise SettingsError("AGENTSTATE_PORT=0 takes any port: name one for the service")
    command, environment = launcher.engine_command(settings, arguments, os.environ)
    launcher.require_free_port(settings.host, settings.port)
    url = f"http://{launcher.reached(settings.host)}:{settings.port}"
    host, port = (launcher.value_of(arguments, flag) for flag in ("--host", "--port"))
    engine_url = f"http://{launcher.reached(host or '127.0.0.1')}:{port or 30000}"
    asked = _Asked()
    parts: list[_Part] = []
    try:
        _say(f"starting the service at {url}")
        parts.append(_Part("service", [sys.executable, "-m", "agentstate.cli", "serve"], os.environ))
        if _answers(f"{url}/healthz", parts, asked):
            _say("starting the engine")
            parts.append(_Part("engine", command, environment))
            if _answers(f"{engine_url}/health", parts, asked):
                _say(f"ready: agents call {url}/v1")
                _wait(parts, asked)
    finally:
        whole = [_end(part, asked) for part in parts]
    return 0 if asked.times and all(whole) else 1


class _Asked:
    """How often this process was told to end. The first time, its parts end in order; the second time, at once."""

    def __init__(self) -> None:
        self.times = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        self.times += 1


class _Part:
    """A process whose output is passed on, a line at a time, with its name before it."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]):
        self.name = name
        # A session of its own: a terminal's Ctrl-C does not reach it, and what it starts ends with it.
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    def status(self) -> int | None:
        return self._process.poll()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL to all of it, and pass on what it has said before."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()

    def wait(self, until: Callable[[], bool], timeout_s: float) -> bool:
        """Whether it ended by itself before ``until`` and in time."""
        for _ in range(round(timeout_s / _POLL_S)):
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_POLL_S)
                return True
            if until():
                break
        return False

    def _pass_on(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # Of what a progress bar writes over itself, the last state.
            said = re.split(r"\r", line.decode(errors="replace").rstrip("\r\n"))[-1]
            _print(self.name, said)


def _answers(url: str, parts: Sequence[_Part], asked: _Asked) -> bool:
    """Wait until ``url`` answers with a success; False once a part has ended or this process is told to."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while not asked.times and all(part.status() is None for part in parts):
        try:
            with direct.open(url, timeout=5):
                return True
        except OSError:
            _pause()
    return False


def _wait(parts: Sequence[_Part], asked: _Asked) -> None:
    while not asked.times and all(part.status() is None for part in parts):
        _pause()


def _pause() -> None:
    threading.Event().wait(_POLL_S)


def _end(part: _Part, asked: _Asked) -> bool:
    """End a part. Returns whether it ended by itself, and well, when it was told to."""
    if (status := part.status()) is not None:
        part.kill()
        _say(f"the {part.name} ended by itself, with status {status}")
        return False
    before = asked.times
    _say(f"ending the {part.name}" + ("" if part.name == "service" else ", which stores what it has"))
    part.send(signal.SIGTERM)
    ended = part.wait(lambda: asked.times > max(1, before), _ENGINE_END_S if part.name == "engine" else _SERVICE_END_S)
    part.kill()
    _say(f"the {part.name} {'has ended' if ended else 'was killed'}")
    return ended


def _say(text: str) -> None:
    _print("up", text)


def _print(name: str, text: str) -> None:
    # Lines of several threads, each whole.
    with _printing:
        sys.stdout.write(f"{name:<8}| {visible(text)}\n")
        sys.stdout.flush()
