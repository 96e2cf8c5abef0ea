"""What other people's code may import, and the examples and documents do. Everything else may move."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import agentstate
import agentstate.client

ROOT = Path(__file__).parents[2]

PUBLIC = {
    # Which these are, test_client_surface.py says.
    "agentstate": set(agentstate.__all__),
    "agentstate.client": set(agentstate.client.__all__),
    "agentstate.errors": {"AgentStateError", "LeaseLost", "SessionBusy", "SessionNotFound"},
    "agentstate.adapters.google_adk": {"AgentStateSessionService"},
    "agentstate.adapters.langgraph": {"AgentStateSaver"},
    "agentstate.adapters.openai_agents": {"AgentStateSession"},
}
"""Of errors, any that a docstring of a public name says it raises: these are some of them."""


def programs() -> Iterator[tuple[str, str]]:
    """Every example, and every block of Python in the documents."""
    for path in sorted((ROOT / "examples").glob("*.py")):
        yield str(path), path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)):
            yield f"{path}, block {number}", block


def test_public_names_are_where_they_were() -> None:
    for module in ("agentstate", "agentstate.client", "agentstate.errors"):
        assert not {name for name in PUBLIC[module] if not hasattr(import_module(module), name)}
    # Their frameworks are not installed here: the tests of the adapters import them.
    for module in filter(lambda name: name.startswith("agentstate.adapters."), PUBLIC):
        tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
        assert {node.name for node in tree.body if isinstance(node, ast.ClassDef)} >= PUBLIC[module]


def test_examples_and_documents_import_public_names_alone() -> None:
    found = {}
    for where, program in programs():
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.Import):
                assert not [name.name for name in node.names if name.name.startswith("agentstate.")], where
            elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "agentstate":
                found[where] = found.get(where, set()) | {(str(node.module), name.name) for name in node.names}
    assert len(found) > 5
    private = {
        where: hidden
        for where, names in found.items()
        if (hidden := {(module, name) for module, name in names if name not in PUBLIC.get(module, ())})
    }
    assert private == {}
