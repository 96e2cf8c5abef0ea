"""What tests need beside Python, and what becomes of them without it."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest


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
