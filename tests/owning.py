"""A process that has a page store open, for those that read it: LMDB's indexes are opened once a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from contents import MARK, MLA

from agentstate.pages import Geometry

_TESTS = Path(__file__).parent
_PROGRAM = """
import sys
from pathlib import Path
from contents import drop, keys, write
from agentstate.pages import Geometry, PageStore, Quota

store = PageStore(Path(sys.argv[1]), bytes.fromhex(sys.argv[2]), eval(sys.argv[3]))
print("open", flush=True)
for line in sys.stdin:
    print(repr(eval(line)), flush=True)
"""


class StoreOwner:
    """Evaluates expressions about its ``store``, with what `contents` has: gives back what Python shows of the result.
    It ends with `kill`."""

    def __init__(self, directory: Path, mark: bytes = MARK, geometry: Geometry = MLA):
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(directory), mark.hex(), repr(geometry)],
            env=os.environ | {"PYTHONPATH": f"{_TESTS}{os.pathsep}{_TESTS.parent}"},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._answer()

    def __call__(self, expression: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        assert answer, "it has ended"
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()
