"""What commands print: tables for people, JSON for programs, and progress on standard error.

Standard output has what was asked for, and nothing else. A terminal gets a table with lines; a pipe, a file and a dumb
terminal get columns with spaces between them, a line a row. Nothing is ever cut: where a table is wider than the
terminal, the terminal wraps it. What users and tools wrote is shown with its control characters spelt out
(`visible`).
"""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from agentstate.errors import (
    AgentStateError,
    DatabaseUnreachable,
    EngineUnreachable,
    HostRefused,
    ServiceUnreachable,
    TierUnavailable,
    Unauthenticated,
)

UNREACHABLE, DENIED = 3, 4
_STATUS: dict[type[AgentStateError], int] = {
    ServiceUnreachable: UNREACHABLE,
    DatabaseUnreachable: UNREACHABLE,
    EngineUnreachable: UNREACHABLE,
    TierUnavailable: UNREACHABLE,
    Unauthenticated: DENIED,
    HostRefused: DENIED,
}
# Format characters that scripts and emoji need: joiners, and the soft hyphen.
_HARMLESS = "\u200c\u200d\xad"
_errors_as_json = False


def _note_json(asked: bool) -> bool:
    global _errors_as_json
    _errors_as_json = asked
    return asked


AsJson = Annotated[
    bool, typer.Option("--json", callback=_note_json, help="Print JSON instead of a table, errors included.")
]

Url = Annotated[
    str | None, typer.Option(envvar="AGENTSTATE_URL", help="The service. By default the one that `serve` starts here.")
]
ApiKey = Annotated[str | None, typer.Option(envvar="AGENTSTATE_API_KEY", help="A key of the session's tenant.")]


def visible(text: object) -> str:
    """``text`` with what would steer a terminal, or turn the order of its characters, spelt out: ``\\x1b`` for an
    escape, ``\\u202e`` for an override of the direction."""
    return "".join(one if _harmless(one) else _spelt(one) for one in str(text))


def _harmless(one: str) -> bool:
    # Control characters, format characters (those of bidirectional text are among them), halves of surrogate pairs,
    # and separators of lines and paragraphs.
    return one in _HARMLESS or unicodedata.category(one) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _spelt(one: str) -> str:
    if one in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[one]
    code = ord(one)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def say(text: object) -> None:
    """Print a line for people on standard error."""
    print(visible(text), file=sys.stderr)


def show_line(text: object) -> None:
    """Print a line for people on standard output."""
    print(visible(text))


def show_json(value: Any) -> None:
    """Print ``value`` as JSON in ASCII: no character in it can steer a terminal."""
    print(json.dumps(value, indent=2 if sys.stdout.isatty() else None))


def show_error(error: Exception, kind: str, *, retryable: bool) -> None:
    """Print why a command failed on standard error: a line, or an object where the command was asked for JSON."""
    if _errors_as_json:
        print(json.dumps({"error": kind, "message": str(error), "retryable": retryable}), file=sys.stderr)
    else:
        lines = str(error).split("\n")
        print("\n".join(visible(line) for line in (f"agentstate: {lines[0]}", *lines[1:])), file=sys.stderr)


def status_of(error: AgentStateError) -> int:
    """The exit status of a command that fails like this."""
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 1)


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something that cannot be undone, unless the caller has said ``yes``. Ends the process with status 1
    if the answer is no, and with 2 if there is no terminal to ask on."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("there is no terminal to ask on: say --yes", param_hint="--yes")
    typer.confirm(visible(question), abort=True, err=True)


def show_table(header: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Collection[str] = ()) -> None:
    """A table of what `shown` makes of its cells; the columns named ``right`` are aligned there."""
    cells = [[_lines(value) for value in row] for row in rows]
    if not (_is_terminal() and _show_lined(header, cells, right)):
        _show_plain(header, cells, right)


def show_rows(rows: list[dict[str, Any]], as_json: bool, *, none: str = "no pages are stored there") -> None:
    """Rows with the same fields, numbers aligned right; ``none`` is said where there are no rows."""
    if as_json:
        show_json(rows)
    elif not rows:
        show_line(none)
    else:
        numbers = [name for name in rows[0] if not any(isinstance(row[name], str) for row in rows)]
        show_table(list(rows[0]), [list(row.values()) for row in rows], right=numbers)


def show_fields(fields: dict[str, Any]) -> None:
    """A table of one thing: a field a row."""
    cells = [[_lines(name), _lines(value)] for name, value in fields.items()]
    if not (_is_terminal() and _show_lined(None, cells, ())):
        _show_plain(None, cells, ())


def shown(value: Any) -> str:
    """A cell's text: numbers with commas, an item of a list a line, and nothing for None."""
    return "\n".join(_lines(value))


@contextmanager
def progress(what: str, n_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over so many bytes. Yields a function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=n_bytes)
        yield lambda more: bar.advance(task, more)


def _lines(value: Any) -> list[str]:
    if isinstance(value, list | tuple):
        return [line for item in value for line in _lines(item)] or [""]
    if isinstance(value, dict):
        return [f"{visible(name)} {' '.join(_lines(item))}" for name, item in value.items()] or [""]
    if value is None:
        return [""]
    if isinstance(value, int) and not isinstance(value, bool):
        return [f"{value:,}"]
    return [visible(value)]


def _is_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _show_lined(header: Sequence[str] | None, cells: list[list[list[str]]], right: Collection[str]) -> bool:
    """False, and nothing is printed, where the terminal is too narrow."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    console, table = Console(highlight=False), Table(show_header=header is not None)
    for number in range(len(cells[0]) if header is None and cells else len(header or ())):
        name = "" if header is None else header[number]
        of_column = [line for row in cells for line in row[number]]
        # Whoever copies an id, a path or a number gets all of it. Texts of several words may wrap.
        table.add_column(
            name, justify="right" if name in right else "left", no_wrap=not any(" " in line for line in of_column)
        )
    for row in cells:
        table.add_row(*(Text("\n".join(lines)) for lines in row))
    if Measurement.get(console, console.options.update(max_width=1 << 20), table).minimum > console.width:
        return False
    console.print(table)
    return True


def _show_plain(header: Sequence[str] | None, cells: list[list[list[str]]], right: Collection[str]) -> None:
    rows = [[", ".join(lines) for lines in row] for row in cells]
    if header is not None:
        rows = [list(header), *rows]
    if not rows:
        return
    widths = [max(_width(row[number]) for row in rows) for number in range(len(rows[0]))]
    for row in rows:
        line = []
        for number, (text, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - _width(text))
            line.append(space + text if header is not None and header[number] in right else text + space)
        print("  ".join(line).rstrip())


def _width(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(one) in "WF" for one in text)
    return len(text) + wide - sum(unicodedata.category(one) in ("Mn", "Me", "Cf") for one in text)
