"""A writer that dies before any call that changes the file system: nothing that it would do afterwards is done."""

from __future__ import annotations

import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest.mock import patch

from agentstate.pages import files
from agentstate.tiers import DirectoryTier, ExtentName, directory
from agentstate.tiers.source import Source
from agentstate.tiers.testing.conformance import file_of

CHANGES = ("open", "copy_file_range", "write", "fsync", "link", "rename", "mkdir", "unlink", "close")


class Death(BaseException):
    """Nothing catches it, and what would clean up finds every call dead."""


class DyingOs:
    """The module ``os`` until so many calls that change something were made."""

    def __init__(self, left: int):
        self.left = left
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CHANGES:
            return real

        def call(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left <= 0:
                if self.left == 0 and name == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise Death
            self.calls.append(name)
            return real(*arguments, **named)

        return call


def die(root: Path, name: str, data: bytes, step: int) -> tuple[list[str], bool]:
    """Publish and die before the call ``step``, beginning with 1. Which calls were made, and whether it died: there may
    be no such call."""
    tier = DirectoryTier(root)
    dying = DyingOs(step)
    with file_of(data) as file:
        source = Source(file, b"")
    # Everything that was opened is the dead process's, and closed when it ends.
    before = set(os.listdir("/proc/self/fd"))
    try:
        tier._open()
        with patch.object(directory, "os", dying), patch.object(files, "os", dying):
            tier._publish(ExtentName.parse(name), source, Future())
    except Death:
        pass
    finally:
        source.close()
        for fd in set(os.listdir("/proc/self/fd")) - before:
            try:
                target = os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                continue
            if target.startswith(str(root)):
                os.close(int(fd))
        tier.close()
    return dying.calls, dying.left <= 0
