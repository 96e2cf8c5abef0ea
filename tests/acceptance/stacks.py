"""What the tests' stacks are made with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agentstate.cli.local import LocalStack

MakeStack = Callable[[Path, Path], LocalStack]
