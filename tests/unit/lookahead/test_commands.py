"""What a command line is known by."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentstate.lookahead.commands import head


@pytest.mark.parametrize(
    ("command", "known_by"),
    [
        ("pytest -q tests/unit", "pytest"),
        ("cd /src && pytest -q", "pytest"),
        ("cd /src; FOO=1 BAR=x timeout -k 5 60 ./node_modules/.bin/jest --all", "jest"),
        ("sudo -E nice make test", "make test"),
        ("git diff HEAD~1", "git diff"),
        ("git -C /secret diff", "git"),
        ("git /secret", "git"),
        ("TOKEN=secret curl https://example.org", "curl"),
        ("# a comment\nls -l", "ls"),
        ("/usr/bin/python3.11 script.py", "python3.11"),
        ("$(evil) && ls", ""),
        ("'quoted program' x", ""),
        ("cd /src", ""),
        ("TOKEN=secret", ""),
        ("timeout", ""),
        ("", ""),
    ],
)
def test_a_command_is_known_by_its_program_and_no_argument(command: str, known_by: str) -> None:
    assert head(command) == known_by


@given(st.text())
def test_any_text_has_a_bounded_head(command: str) -> None:
    assert len(head(command)) <= 61


def test_a_huge_text_is_not_read_to_its_end() -> None:
    assert head("cd x\n" * 1_000_000 + "ls") == ""
