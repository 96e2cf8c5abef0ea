"""A plug-in for SGLang with which an engine does not measure what it does, but is told.

Computing a token takes a millisecond, and a forward that restores waits TOLD_WAIT_S seconds for every byte: an engine
on any machine decides alike.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

STEP_S, TOKEN_S = 0.01, 0.001

Parts = Sequence[tuple[int, int]]


def register() -> None:
    from engine_patch.break_even import BreakEven

    wait_s = float(os.environ["TOLD_WAIT_S"])
    stepped, restored = BreakEven.stepped, BreakEven.restored

    def computing_s(parts: Parts) -> float:
        return STEP_S + TOKEN_S * sum(new for _, new in parts)

    def told_stepped(self: BreakEven, parts: Parts, seconds: float) -> None:
        stepped(self, parts, computing_s(parts))

    def told_restored(self: BreakEven, parts: Parts, seconds: float, n_bytes: int, waited_s: float) -> None:
        restored(self, parts, computing_s(parts) + wait_s * n_bytes, n_bytes, wait_s * n_bytes)

    BreakEven.stepped, BreakEven.restored = told_stepped, told_restored  # type: ignore[method-assign]


def environment(directory: Path, wait_s: float) -> dict[str, str]:
    """That of an engine which loads this; ``directory`` is for what says so."""
    info = directory / "told_costs-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: told-costs\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\ntold_costs = told_costs:register\n")
    path = os.pathsep.join([str(directory), str(Path(__file__).parent)])
    return {"PYTHONPATH": path, "TOLD_WAIT_S": str(wait_s), "AGENTSTATE_BREAK_EVEN": "on"}
