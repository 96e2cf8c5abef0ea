"""What tests need of a machine beside Python, and what becomes of them without it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

_MEMORY, _ROOM_BYTES = Path("/dev/shm"), 1 << 30


def in_memory() -> Path | None:
    """Where files are kept in memory, for what depends on no disk but for the time it takes. None where there is no
    room: a container may have 64 MiB."""
    if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free >= _ROOM_BYTES:
        return _MEMORY
    return None


def missing(what: str) -> NoReturn:
    """Skip the test, or fail it where everything should be there: in CI, where `.ci/packages` is installed."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, and CI skips nothing for that")
    pytest.skip(what)


def tool(*names: str) -> str:
    """The path of the first of these programs that is installed."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        missing(f"no {' or '.join(names)}")
    return found
