"""What the processes of a group use, from ``/proc``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def cpu_s(group: int) -> float:
    """The CPU time that those that run have used."""
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    return sum((int(fields[11]) + int(fields[12])) * tick_s for _, fields in _stats(group))


def rss_bytes(group: int) -> int:
    """Their resident memory; what they share counts for each."""
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(int(fields[21]) * page for _, fields in _stats(group))


def pss_bytes(group: int) -> int:
    """Their resident memory; what they share counts once."""
    return sum(_pss_bytes(process) for process, _ in _stats(group))


def _pss_bytes(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _stats(group: int) -> Iterator[tuple[int, list[str]]]:
    """The processes of a group, with the fields of their stat from the third, their state, on."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[2]) == group:
            yield int(path.parent.name), fields
