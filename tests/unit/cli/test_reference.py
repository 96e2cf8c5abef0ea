"""The commands, their help and `docs/cli.md`: each says what the others say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from documented import undocumented

from agentstate.cli import reference
from agentstate.cli.fields import FIELDS

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/cli.md"
HEAVY = {"textual", "sqlalchemy", "numpy", "httpx", "fastapi", "torch", "rich", "lmdb", "zmq", "aiohttp"}
COMMANDS = dict(reference.commands())
GROUPS = sorted({name.partition(" ")[0] for name in COMMANDS if " " in name})


def test_the_page_is_current() -> None:
    assert PAGE.read_text().partition(reference.MARK)[2] == reference.text().removeprefix(reference.MARK)


def test_fields_are_those_of_commands_that_print_json() -> None:
    asked = {name for name, one in COMMANDS.items() for of in one.params if "--json" in of.opts and of.is_flag}
    assert {name.removesuffix("[]").removesuffix(" --shared") for name in FIELDS} == asked


def test_every_command_and_option_says_what_it_is() -> None:
    assert not [name for name, one in COMMANDS.items() if not one.help]
    bare = [
        f"{name} {of.name}"
        for name, one in COMMANDS.items()
        for of in one.params
        if not of.help and not name.startswith("bench")
    ]
    assert not bare


@pytest.mark.parametrize("asked", ["", *GROUPS, "sessions kv", "top"])
def test_help_imports_nothing_heavy(asked: str) -> None:
    """Nor does a press of TAB: it imports the same. (Typer needs pydantic for an option that has a range.)"""
    heavy = HEAVY | (set() if asked else {"pydantic"})
    program = (
        "import sys\n"
        "from agentstate.cli.main import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end\n"
        f"sys.exit(', '.join({heavy!r} & sys.modules.keys()) or None)"
    )
    command = [sys.executable, "-c", program, *asked.split(), "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Usage: agentstate")
    assert "\x1b" not in run.stdout and "─" not in run.stdout


def test_what_is_not_listed_is_found() -> None:
    assert undocumented("pages push", {"extents": "1", "more": 0}) == [
        "more is not listed",
        "extents is '1', not integer",
        "new is missing",
        "bytes is missing",
        "unreadable is missing",
        "manifests is missing",
    ]
    wrong = undocumented("pages du", {"stores": [{"rank": "0"}], "disk_free_fraction": None, "written_bytes_day": True})
    assert wrong[0] == "written_bytes_day is True, not integer" and "stores[].live is missing" in wrong
