"""A drive that is as slow as one likes: a library that an engine preloads (slow_drive.c), and what sets its speed."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from agentstate.errors import SettingsError

_SOURCE = Path(__file__).with_suffix(".c")


class Drive:
    """The drive of the engines that run in ``environment``: how fast it is. ``directory`` is for the library, which is
    built there. Raises SettingsError where there is no C compiler."""

    def __init__(self, directory: Path):
        library = directory / "slow_drive.so"
        command = [_compiler(), "-shared", "-fPIC", "-O1", "-o", str(library), str(_SOURCE), "-ldl", "-lpthread"]
        subprocess.run(command, check=True)
        self._speed = directory / "speed"
        self._held = directory / "speed.held"
        self.environment = {"LD_PRELOAD": str(library), "SPEED": str(self._speed)}
        self.answer()

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
        """Let it be as fast as it is."""
        self.set(1e12)

    def await_caller(self) -> None:
        """Wait until somebody waits for a drive that hangs."""
        while not self._held.exists():
            time.sleep(0.01)


def _compiler() -> str:
    name = os.environ.get("CC", "cc")
    if (found := shutil.which(name)) is None:
        raise SettingsError(f"a drive is slowed down by a library, and there is no C compiler {name} to build it")
    return found
