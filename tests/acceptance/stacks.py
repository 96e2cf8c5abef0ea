"""What the tests' stacks are made with, and the slow drive below some of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from agentstate.cli.local import LocalStack

MakeStack = Callable[[Path, Path], LocalStack]


class Drive:
    """The drive of the engines that have the environment `slow_drive`: how fast it is."""

    def __init__(self, speed: Path):
        self._speed = speed
        self._held = speed.with_name(f"{speed.name}.held")

    def set(self, bytes_per_s: float, of: str = "") -> None:
        """Of all files, or of those that have ``of`` in their path."""
        written = self._speed.with_name("written")
        written.write_text(f"{bytes_per_s} {of}")
        written.rename(self._speed)  # it is read at any time

    def hang(self, of: str = "") -> None:
        """Let it answer nothing that is asked for from now on, before `set` is called."""
        self._held.unlink(missing_ok=True)
        self.set(0, of)

    def answer(self) -> None:
        self.set(1e12)

    def await_caller(self) -> None:
        """Wait until somebody waits for a drive that hangs."""
        while not self._held.exists():
            time.sleep(0.01)
