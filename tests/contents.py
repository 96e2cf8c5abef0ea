"""The pages of the tests: see `agentstate.pages.testing.pages`."""

from agentstate.pages.testing.pages import (
    MARK,
    MHA,
    MLA,
    WIDE,
    content,
    drop,
    expected,
    key,
    keys,
    read,
    reader_for,
    write,
)

__all__ = ["MARK", "MHA", "MLA", "WIDE", "content", "drop", "expected", "key", "keys", "read", "reader_for", "write"]
