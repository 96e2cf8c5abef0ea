"""`agentstate doctor`: what is wrong here, what follows from it, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

import typer

from agentstate.cli import doctor_machine as machine
from agentstate.cli import doctor_parts as parts
from agentstate.cli.findings import Check, examine, exit_status, show
from agentstate.cli.output import show_json
from agentstate.settings import Settings

NAMES = (
    "python",
    "sglang",
    "native",
    "drive",
    "descriptors",
    "memory",
    "memory-lock",
    "numa",
    "gpu",
    "shm",
    "io-uring",
    "database",
    "engines",
    "store",
    "service",
)


def checks(flags: list[str], url: str | None, api_key: str | None) -> Mapping[str, Check]:
    """All checks by name, in the order of ``NAMES``."""
    every: tuple[Check, ...] = (
        parts.python,
        partial(parts.sglang, flags=flags),
        parts.native,
        machine.drive,
        machine.descriptors,
        machine.memory,
        machine.memory_lock,
        machine.numa,
        machine.gpu,
        machine.shared_memory,
        machine.io_uring,
        parts.database,
        parts.engines,
        parts.store,
        partial(parts.service, url=url, api_key=api_key),
    )
    return dict(zip(NAMES, every, strict=True))


def run(
    settings: Settings,
    flags: list[str],
    url: str | None,
    api_key: str | None,
    *,
    only: str,
    timeout_s: float,
    strict: bool,
    verbose: bool,
    as_json: bool,
) -> int:
    """Print what is found. Returns the exit status."""
    every = checks(flags, url, api_key)
    if only:
        wanted = [name.strip() for name in only.split(",")]
        if unknown := [name for name in wanted if name not in every]:
            hint = f"{', '.join(unknown)}: there are {', '.join(every)}"
            raise typer.BadParameter(hint, param_hint="--only")
        if {"engines", "store"} & set(wanted):
            wanted.append("database")  # they say nothing without it
        every = {name: check for name, check in every.items() if name in wanted}
    looked = examine(every, settings, timeout_s)
    if as_json:
        found = list(looked)
        show_json([{name: value for name, value in asdict(one).items() if name != "status"} for one in found])
    else:
        found = show(looked, verbose=verbose)
    return exit_status(found, strict=strict)
