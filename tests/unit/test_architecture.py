"""Which room may import which."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SERVICE, BENCHMARKS = "agentstate.api", "agentstate.benchmarks"
FORBIDDEN = {
    "agentstate": {"torch", "sglang", "fastapi", "starlette", "uvicorn", SERVICE, "engine_patch", BENCHMARKS},
    "api": {"torch", "sglang", "engine_patch", BENCHMARKS},
    "engine_patch": {SERVICE, "fastapi", "starlette", "uvicorn", BENCHMARKS},
    "migrations": {"torch", "sglang", "fastapi", SERVICE, "engine_patch", BENCHMARKS},
}
LINKED = ("api", "benchmarks", "migrations")
"""Folders of the checkout that are imported as parts of `agentstate`, through links in it."""


def imported(source: str) -> set[str]:
    """The packages that a module imports something of, anywhere in it, also inside of functions: all of their names,
    ``a``, ``a.b`` and ``a.b.c`` for ``from a.b import c``."""
    found = set()
    for name in imported_modules(source):
        parts = name.split(".")
        found |= {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    broken = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported(path.read_text()) & FORBIDDEN[room]
    }
    assert not broken


def test_what_is_linked_is_imported_by_the_name_that_it_is_installed_under() -> None:
    """In a checkout, its own name would do too, and make a second module of it."""
    assert {path.name for path in (ROOT / "agentstate").iterdir() if path.is_symlink()} == set(LINKED)
    folders = (".ci", "agentstate", "clients", "engine_patch", "examples", "tests", *LINKED)
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 500
    bare = re.compile(rf"({'|'.join(LINKED)})(\.(?!md\b)[a-z_]\w*)*(:\w+)?")
    wrong = {f"{path.relative_to(ROOT)}: {name}" for path in files for name in named(path) if bare.fullmatch(name)}
    assert not wrong


def named(path: Path) -> Iterator[str]:
    """What a file imports, and every text in it with a dot."""
    for node in ast.walk(ast.parse(path.read_text())):
        yield from modules_of(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            yield node.value


@pytest.mark.parametrize("package", ["agentstate", "engine_patch"])
def test_files_and_folders_import_no_circle(package: str) -> None:
    """Also what is imported for its types alone: who names another's type leans on it."""
    files, linked = modules(package), tuple(f"agentstate.{name}" for name in LINKED)
    files_lean_on: dict[str, set[str]] = {name: set() for name in files}
    folders_lean_on: dict[str, set[str]] = {}
    for name, path in files.items():
        for other in imported_modules(path.read_text()):
            if other.startswith(linked):  # rooms of their own
                continue
            while other not in files and "." in other:
                other = other.rpartition(".")[0]
            if other not in files or other == name:
                continue
            # A package's own file gathers what is below it.
            files_lean_on[name] |= {other}
            own, others = folder(name), folder(other)
            if own != others and path.name != "__init__.py":
                folders_lean_on.setdefault(own, set()).add(others)
    for leans_on in (files_lean_on, folders_lean_on):
        assert len(list(TopologicalSorter(leans_on).static_order())) >= len(leans_on) > 0


def modules(package: str) -> dict[str, Path]:
    """The files of a package by their modules' names."""
    files = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def folder(module: str) -> str:
    """The room of a module: its folder at the top of its package, or itself."""
    return ".".join(module.split(".")[:2])


def imported_modules(source: str) -> Iterator[str]:
    """The modules that one imports, anywhere in it: ``a.b`` and ``a.b.c`` for ``from a.b import c``."""
    for node in ast.walk(ast.parse(source)):
        yield from modules_of(node)


def modules_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (name.name for name in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield from (f"{node.module}.{name.name}" for name in node.names)


def test_only_the_command_line_names_other_rooms() -> None:
    """What starts another room by name, without an import statement, is the command line and nothing else of the
    core."""
    users = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "agentstate").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "import_module"
    }
    assert users <= {"agentstate/cli/loading.py"}


def test_the_service_needs_no_torch_and_no_sglang() -> None:
    program = (
        "import sys, agentstate, agentstate.client, agentstate.sessions.verbs, agentstate.api.app\n"
        "sys.exit(', '.join({'torch', 'sglang'} & set(sys.modules)) or None)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_core_needs_no_web_framework() -> None:
    program = (
        "import sys, agentstate.client, agentstate.sessions.verbs, agentstate.fleet.operations\n"
        f"sys.exit(', '.join({FORBIDDEN['agentstate']!r} & set(sys.modules)) or None)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_what_the_tests_on_a_gpu_use_needs_no_sglang() -> None:
    files = {ROOT / "engine_patch" / f"{name}.py" for name in ("restore", "spill", "staging", "transfer")}
    seen: set[Path] = set()
    while files:
        seen.add(path := files.pop())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("engine_patch."):
                files |= {ROOT / (str(node.module).replace(".", "/") + ".py")} - seen
    assert ROOT / "engine_patch" / "arrivals.py" in seen
    assert not {path.name for path in seen if "sglang" in imported(path.read_text())}


@pytest.mark.parametrize("package", ["agentstate", "api", "engine_patch"])
def test_no_attribute_hides_a_method_of_its_class(package: str) -> None:
    hidden = [
        f"{path.relative_to(ROOT)}: {cls.name}.{name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for cls in ast.walk(ast.parse(path.read_text()))
        if isinstance(cls, ast.ClassDef)
        for name in methods(cls) & set_on_self(cls)
    ]
    assert not hidden


def methods(cls: ast.ClassDef) -> set[str]:
    """Those that are no properties: a property can be set."""
    return {
        item.name
        for item in cls.body
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and not item.decorator_list
    }


def set_on_self(cls: ast.ClassDef) -> set[str]:
    return {
        node.attr
        for node in ast.walk(cls)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
