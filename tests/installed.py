"""The wheel, built of what is shipped, and installed where nothing of the checkout can be imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTEXT = ROOT / "deploy/compose/Dockerfile.dockerignore"
_ELSEWHERE = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


def source_tree(directory: Path) -> Path:
    """Copy to ``directory`` what the container files are built of, with the links that are in it."""
    for line in CONTEXT.read_text().splitlines():
        if line.startswith("!"):
            source, target = ROOT / line[1:], directory / line[1:]
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
                shutil.copytree(source, target, symlinks=True, ignore=ignored)
            else:
                directory.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
    return directory


def built(kind: str, tree: Path, directory: Path) -> Path:
    """A ``wheel``, or an ``sdist``, of the project in ``tree``, as a builder makes it; in ``directory``."""
    directory.mkdir()
    program = f"from setuptools import build_meta; build_meta.build_{kind}({str(directory)!r})"
    _run([sys.executable, "-c", program], cwd=tree)
    (made,) = directory.iterdir()
    return made


def published(directory: Path) -> Path:
    """The wheel, made like one that is published, of a source archive; below ``directory``."""
    sdist = built("sdist", source_tree(directory / "source"), directory / "sdist")
    return built("wheel", _unpacked(sdist, directory / "unpacked"), directory / "wheel")


def _unpacked(sdist: Path, directory: Path) -> Path:
    shutil.unpack_archive(sdist, directory)
    (tree,) = directory.iterdir()
    return tree


def installed(wheel: Path, directory: Path, like: Path) -> Path:
    """Make an environment in ``directory`` of the wheel and of the packages that the interpreter ``like`` has. Returns
    the directory of its programs."""
    _run([str(like), "-m", "venv", "--symlinks", "--without-pip", str(directory)], cwd=directory.parent)
    # What is locked lies outside of the checkout's environments: see .ci/environment.py.
    where = "import numpy, pathlib; print(pathlib.Path(numpy.__file__).parents[1])"
    packages = _run([str(like), "-c", where], cwd=directory).strip()
    python = directory / "bin" / "python"
    (own,) = directory.glob("lib/python3*/site-packages")
    (own / "packages.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    _run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], cwd=directory)
    found = _run([str(python), "-c", "import agentstate; print(agentstate.__file__)"], cwd=directory)
    assert Path(found.strip()).is_relative_to(own), found
    return python.parent


def outside(**settings: str) -> Mapping[str, str]:
    """The environment of a user who has set ``settings`` and nothing else of AgentState's or Python's."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _ELSEWHERE and not name.startswith("AGENTSTATE_")
    }
    return {**inherited, **settings}


def _run(command: list[str], cwd: Path) -> str:
    ran = subprocess.run(command, cwd=cwd, env=outside(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout
