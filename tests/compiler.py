"""A C compiler, for the tests that put a library between the process and the system."""

from __future__ import annotations

import shutil

import pytest


def c_compiler() -> str:
    """The path of one; skips the test where there is none."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler: libraries for tests cannot be built")
    return compiler
