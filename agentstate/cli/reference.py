"""The part of `docs/cli.md` that is made of the commands themselves."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from agentstate.cli.fields import FIELDS, Fields
from agentstate.cli.main import app

MARK = "<!-- What follows is written by `python -m agentstate.cli.reference docs/cli.md`. -->"
# Benchmarks have a page of their own.
_ELSEWHERE = {
    "bench": "[benchmarks.md](benchmarks.md) says what each measures; `agentstate bench COMMAND --help`, how."
}

# What is passed on.
_REST = {
    "engine": ["SGLANG_FLAGS"],
    "up": ["SGLANG_FLAGS"],
    "doctor": ["[-- SGLANG_FLAGS]"],
    "pages bench": ["[FLAGS]"],
}


def commands(command: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command that can be run, with its name: ``sessions kv``."""
    command = command or get_command(app)
    below = getattr(command, "commands", None)
    if below is None:
        yield name, command
        return
    for own, one in below.items():
        yield from commands(one, f"{name} {own}".strip())


def text() -> str:
    """The reference, in Markdown."""
    lines = [MARK, ""]
    groups = {name: group for name, group in get_command(app).commands.items()}  # type: ignore[attr-defined]
    for name, command in groups.items():
        lines += [f"## agentstate {name}", ""]
        if name in _ELSEWHERE:
            lines += [_paragraph(f"{command.help} {_ELSEWHERE[name]}"), ""]
        elif hasattr(command, "commands"):
            lines += [command.help, ""]
            for own, one in command.commands.items():
                lines += _command(f"{name} {own}", one, "###")
        else:
            lines += _command(name, command, "")
    return "\n".join(lines).rstrip("\n") + "\n"


def main(page: Path) -> None:
    page.write_text(page.read_text().partition(MARK)[0] + text())


def _command(name: str, command: Any, heading: str) -> list[str]:
    usage = [f"agentstate {name}"]
    options, arguments = [], []
    for one in command.params:
        if one.param_type_name == "argument":
            shown = (one.metavar or one.name).upper()
            usage.append(shown if one.required else f"[{shown}]")
            arguments.append((f"`{shown}`", _inline(one.help)))
        elif not set(one.opts) & {"--help", "--install-completion", "--show-completion"}:
            names = ", ".join([*one.opts, *one.secondary_opts])
            value = "" if one.is_flag else f" {one.name.upper()}"
            variable = f" [{one.envvar}]" if one.envvar else ""
            options.append((f"`{names}{value}`", _inline(one.help) + variable))
    lines = [f"{heading} {usage[0]}", ""] if heading else []
    if options:
        usage.append("[OPTIONS]")
    usage += _REST.get(name, [])
    lines += ["```", " ".join(usage), "```", "", _paragraph(_inline(command.help)), ""]
    if arguments or options:
        lines += ["| | |", "|---|---|", *(f"| {left} | {right} |" for left, right in arguments + options), ""]
    for known, fields in FIELDS.items():
        if known.removesuffix("[]").removesuffix(" --shared") == name:
            lines += _fields(known, fields)
    return lines


def _fields(name: str, fields: Fields) -> list[str]:
    what = "a list of objects" if name.endswith("[]") else "an object"
    shared = " with `--shared`" if "--shared" in name else ""
    lines = [f"`--json`{shared}: {what}.", "", "| field | type | |", "|---|---|---|"]
    return [*lines, *(f"| `{field}` | {kind} | {about} |" for field, (kind, about) in fields.items()), ""]


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _inline(text: str | None) -> str:
    """One line, as a cell of a table may hold it."""
    return re.sub(r"\s+", " ", text or "").replace("|", "\\|").replace("*:", "\\*:").strip()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
