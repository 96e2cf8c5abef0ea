"""The commands that the documentation gives, by the name that a comment before each has: ``<!-- run: NAME -->``.

A block that no test runs says so, and is marked as text.
"""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[1]
# Those whose every command is run. Others are older, and have tests of their own where they need them.
DOCUMENTS = ("index.md", "quick-start.md", "concepts.md", "operations.md", "troubleshooting.md")
_BLOCK = re.compile(
    r"(?:<!-- run: (?P<name>[a-z ]+) -->\n *)?```(?P<kind>[a-z]*)\n(?P<commands>.*?)^ *```$", re.DOTALL | re.M
)


def commands(document: str) -> dict[str, str]:
    """The commands of a document. Raises ValueError for a block that has no name."""
    found = {}
    for block in _BLOCK.finditer((ROOT / "docs" / document).read_text()):
        if block["kind"] == "text":
            continue
        if block["name"] is None:
            raise ValueError(f"docs/{document}: no test runs this:\n{block['commands']}")
        found[block["name"]] = dedent(block["commands"])
    return found
