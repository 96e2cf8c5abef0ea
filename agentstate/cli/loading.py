"""Commands that are imported when they run.

A shell starts the program for each press of TAB, and a person waits for `--help`: SQLAlchemy, pydantic and NumPy would
take a second of that. The root names its groups of commands, and what each is for; a group's module is imported when
one of its commands, or its help, is asked for. Help is plain text, since Rich takes longer to import than all of the
rest.
"""

from __future__ import annotations

import importlib
from collections.abc import MutableMapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import typer
from typer.core import TyperGroup
from typer.main import get_command

if TYPE_CHECKING:
    from agentstate.settings import Settings


class Commands(TyperGroup):
    """A group whose help has the first sentence of each command, whole."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            named = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
            formatter.write_dl([(name, command.get_short_help_str(_WHOLE)) for name, command in named if command])


def group(*, help: str | None = None) -> typer.Typer:
    """A group of commands, without colours and boxes in its help and in what it says of wrong usage."""
    app = typer.Typer(
        help=help,
        cls=Commands,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    # Without a callback, a single command would be taken for the whole group.
    app.callback()(lambda: None)
    return app


def add_group(app: typer.Typer, name: str, module: str, help: str) -> None:
    """Add the group ``app`` of a module, which is imported once it is needed."""

    class Loaded(Commands):
        def __init__(self, **given: Any):
            self._loaded: dict[str, Any] | None = None
            super().__init__(**given)

        @property
        def commands(self) -> MutableMapping[str, Any]:
            if self._loaded is None:
                self._loaded = dict(cast(TyperGroup, get_command(room(module).app)).commands)
            return self._loaded

        @commands.setter
        def commands(self, _: Any) -> None:
            pass  # there are none before they are loaded

    app.add_typer(typer.Typer(cls=Loaded, no_args_is_help=True), name=name, help=help)


def room(name: str) -> ModuleType:
    """A module, of this package or of another one, which the command line otherwise never imports."""
    return importlib.import_module(name)


def settings(**given: Any) -> Settings:
    """The settings of this process, those ``given`` in place of the environment's. Raises SettingsError."""
    from agentstate.settings import Settings

    return Settings(**given)


# Longer than any first sentence.
_WHOLE = 1000
