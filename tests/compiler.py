"""A C compiler, for the tests that put a library between the process and the system."""

from __future__ import annotations

from tools import tool


def c_compiler() -> str:
    """The path of one."""
    return tool("cc", "gcc", "clang")
