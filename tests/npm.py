"""Packages of npm for tests: installed once, outside the checkout."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from pathlib import Path

from tools import missing, tool


def installed(directory: Path, cache: Path) -> Path:
    """The packages that a directory's lock file names. They lie in the cache, named by that file."""
    tool("node")
    lock = (directory / "package-lock.json").read_bytes()
    packages = cache / f"{directory.name}-{hashlib.sha256(lock).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with Path(f"{packages}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # another process may be installing the same packages
        if not (packages / "complete").exists():
            shutil.rmtree(packages, ignore_errors=True)
            packages.mkdir()
            for file in ("package.json", "package-lock.json"):
                shutil.copy(directory / file, packages)
            # Not `npm ci`, which wants every platform's programs in the lock, and registries lack some.
            install = [tool("npm"), "install", "--no-save", "--no-audit", "--no-fund"]
            ran = subprocess.run(install, cwd=packages, capture_output=True, text=True, check=False)
            if ran.returncode:
                missing(f"npm cannot install {directory}: {ran.stderr.strip()[-500:]}")
            (packages / "complete").touch()
    return packages / "node_modules"
