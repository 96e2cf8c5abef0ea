"""What a terminal, a pipe and a program get."""

from __future__ import annotations

import json
import sys

import pytest
from rich.cells import cell_len

from agentstate.cli import output
from agentstate.cli.output import show_error, show_fields, show_json, show_rows, show_table, visible
from agentstate.errors import ServiceUnreachable

HOSTILE = "\x1b[2J\x1b]0;owned\x07\r\n\u202edetrevni\u2066\u200b\x9b\x7f\ud800[red]x[/red]"
SPELT = "\\x1b[2J\\x1b]0;owned\\x07\\r\\n\\u202edetrevni\\u2066\\u200b\\x9b\\x7f\\ud800[red]x[/red]"
IDS = ["ses_01k8z3v9q4e7w2m5n8r1t6y0ab", "user@example.com/a-name-that-is-longer-than-any-terminal-" + "x" * 60]


@pytest.fixture(params=["a terminal", "a pipe"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(output, "_is_terminal", lambda: request.param == "a terminal")
    monkeypatch.setenv("COLUMNS", "80")
    return str(request.param)


def test_what_would_steer_a_terminal_is_spelt_out() -> None:
    assert visible(HOSTILE) == SPELT
    assert visible("naïve 日本 👩‍👩‍👧 می‌خواهم e\u0301") == "naïve 日本 👩‍👩‍👧 می‌خواهم e\u0301"


def test_no_table_sends_what_users_wrote(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_table(("id", HOSTILE[:0] + "note"), [("1", HOSTILE)])
    show_rows([{"id": "1", "note": HOSTILE, "owners": {HOSTILE: 1}}], as_json=False)
    show_fields({"note": [HOSTILE, HOSTILE]})
    show_error(ServiceUnreachable(HOSTILE), "service-unreachable", retryable=True)
    show_json({"note": HOSTILE})
    printed = capsys.readouterr()
    assert not {one for one in printed.out + printed.err if visible(one) != one} - {"\n"}
    assert SPELT in printed.out.replace("\n", "")


@pytest.mark.parametrize("id", IDS)
def test_ids_are_whole_at_80_columns(kind: str, id: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": id, "model": "m" * 30, "note": "several words that can be wrapped " * 3, "bytes": 168_185_856}]
    show_rows(rows, as_json=False)
    printed = capsys.readouterr().out
    assert id in printed and "168,185,856" in printed and "m" * 30 in printed
    assert "…" not in printed


def test_a_pipe_gets_a_line_a_row_without_lines_and_colours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    show_table(
        ("id", "tokens", "note"), [("a", 5, "日本"), ("bcd", 1234, None), ("e", 0, ["x", "y"])], right=("tokens",)
    )
    assert capsys.readouterr().out.splitlines() == [
        "id   tokens  note",
        "a         5  日本",
        "bcd   1,234",
        "e         0  x, y",
    ]
    show_table(("a", "b"), [("日本", 1), ("x", 2)])
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert cell_len(first) == cell_len(second)


@pytest.mark.parametrize(("terminal", "lined"), [("xterm-256color", True), ("dumb", False)])
def test_a_dumb_terminal_gets_no_lines(
    terminal: str, lined: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", terminal)
    show_table(("id",), [("a",)])
    assert ("│" in capsys.readouterr().out) is lined


def test_without_colour_nothing_is_sent_but_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "_is_terminal", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_table(("id",), [("a",)])
    printed = capsys.readouterr().out
    assert not [code for code in ("\x1b[3", "\x1b[4", "\x1b[9") if code in printed.replace("\x1b[3m", "")]


def test_errors_are_objects_where_json_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = ServiceUnreachable("no answer\nat all")
    monkeypatch.setattr(output, "_errors_as_json", False)
    show_error(error, error.slug(), retryable=error.retryable)
    assert capsys.readouterr().err == "agentstate: no answer\nat all\n"
    monkeypatch.setattr(output, "_errors_as_json", True)
    show_error(error, error.slug(), retryable=error.retryable)
    said = json.loads(capsys.readouterr().err)
    assert said == {"error": "service-unreachable", "message": "no answer\nat all", "retryable": True}
