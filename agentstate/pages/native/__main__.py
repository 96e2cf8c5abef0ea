"""`python -m agentstate.pages.native`: says whether this Python uses the native extension; its status is 1 if not."""

from __future__ import annotations

import sys

from agentstate.pages.native import why_not

if __name__ == "__main__":
    print(why_not or "used")
    sys.exit(1 if why_not else 0)
