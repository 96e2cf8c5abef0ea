"""What a look at an installation finds, and how one is taken: each check in a process of its own, with a deadline.

A check that hangs in a driver or on a mount that is gone costs its deadline and nothing else; one that crashes is a
finding. Checks change nothing.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from agentstate.cli.output import DENIED, UNREACHABLE, show_line, status_of
from agentstate.errors import AgentStateError

if TYPE_CHECKING:
    from agentstate.settings import Settings

_READ_BYTES = 1 << 16
_SECRET = re.compile(r"(?i)(secret|password|token|api_key|account_key|store_key)(_\w+)?$")
# What is shorter would be cut out of other words.
_LEAST_SECRET = 6


class Level(StrEnum):
    OK = "ok"
    KNOW = "know"
    FIX = "fix"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """What one check has found. ``what`` says it in a sentence; ``measured`` is what that rests on, ``consequence``
    what follows from it, and ``command`` what to do or to run. ``status`` is the exit status that it asks for if it is
    to be fixed: 1, or that of something which cannot be reached, or may not be used."""

    check: str
    level: Level
    what: str
    measured: str = ""
    consequence: str = ""
    command: str = ""
    status: int = 1


Check = Callable[["Settings"], Iterable[Finding]]


def examine(checks: Mapping[str, Check], settings: Settings, timeout_s: float) -> Iterator[Finding]:
    """What the checks find, one after the other: none disturbs what another one measures. Each has ``timeout_s``."""
    secrets = _secrets(settings)
    for name, check in checks.items():
        for found in _forked(name, check, settings, timeout_s):
            yield replace(
                found,
                what=_redacted(found.what, secrets),
                measured=_redacted(found.measured, secrets),
                consequence=_redacted(found.consequence, secrets),
                command=_redacted(found.command, secrets),
            )


def exit_status(found: Sequence[Finding], *, strict: bool) -> int:
    """0, or for what is to be fixed 3 if something cannot be reached, 4 if something may not be used, else 1."""
    asked = {one.status for one in found if one.level is Level.FIX}
    for status in (UNREACHABLE, DENIED):
        if status in asked:
            return status
    return 1 if asked or (strict and any(one.level is Level.KNOW for one in found)) else 0


def show(found: Iterable[Finding], *, verbose: bool) -> list[Finding]:
    """Print findings as they come, and how many there are in the last line. Returns them."""
    seen = []
    for one in found:
        seen.append(one)
        if one.level is Level.OK and not verbose:
            continue
        show_line(f"{one.level.value:<8}{one.check}: {one.what}")
        if one.level is Level.SKIPPED:
            continue
        for name, text in (("measured", one.measured), ("so", one.consequence), ("do", one.command)):
            if text:
                show_line(f"        {name + ':':<10}{text}")
    counts = {level: sum(one.level is level for one in seen) for level in (Level.FIX, Level.KNOW)}
    show_line(f"{counts[Level.FIX]} to fix, {counts[Level.KNOW]} to know")
    return seen


def _forked(name: str, check: Check, settings: Settings, timeout_s: float) -> list[Finding]:
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        _look(name, check, settings, writable)
    os.close(writable)
    said, deadline = b"", time.monotonic() + timeout_s
    try:
        while True:
            if not select.select([readable], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return [_late(name, timeout_s)]
            if not (piece := os.read(readable, _READ_BYTES)):
                break
            said += piece
        try:
            return [Finding(**{**one, "level": Level(one["level"])}) for one in json.loads(said)]
        except ValueError:
            what = "the check itself ended without a word"
            return [Finding(name, Level.FIX, what, consequence="nothing is known of what it looks at")]
    finally:
        os.close(readable)
        # What it has started ends with it. It is not waited for: it may hang where not even SIGKILL ends it.
        for end in (os.killpg, os.kill):
            with suppress(ProcessLookupError, PermissionError):
                end(child, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


def _look(name: str, check: Check, settings: Settings, writable: int) -> None:
    """The child's part. Never returns."""
    try:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nowhere, number)
        try:
            found = list(check(settings))
        except AgentStateError as error:
            found = [Finding(name, Level.FIX, str(error), status=status_of(error))]
        except Exception as error:
            found = [Finding(name, Level.FIX, f"the check failed: {error!r}")]
        said = json.dumps([asdict(one) for one in found]).encode()
        while said:
            said = said[os.write(writable, said) :]
    finally:
        os._exit(0)


def _late(name: str, timeout_s: float) -> Finding:
    return Finding(
        name,
        Level.FIX,
        f"no answer within {timeout_s:g} s",
        consequence="what uses it hangs as well",
        command=f"agentstate doctor --only {name} --timeout {10 * timeout_s:g}",
        status=UNREACHABLE,
    )


def _secrets(settings: Settings) -> list[str]:
    hidden = [settings.store_key.get_secret_value(), settings.engine_api_key.get_secret_value()]
    hidden += [one for key in hidden for one in key.split(",")]
    hidden += [value for name, value in os.environ.items() if _SECRET.search(name)]
    return sorted({one for one in hidden if len(one) >= _LEAST_SECRET}, key=len, reverse=True)


def _redacted(text: str, secrets: list[str]) -> str:
    from agentstate.sql import address

    for secret in secrets:
        text = text.replace(secret, address.HIDDEN)
    return address.mask(text)
