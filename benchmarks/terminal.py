"""Where benchmarks print what they found."""

from __future__ import annotations

import sys

from rich.console import Console

# In a file or a pipe there is no width to keep to.
console = Console(width=None if sys.stdout.isatty() else 160)
