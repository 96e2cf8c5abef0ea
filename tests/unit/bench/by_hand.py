"""Costs that are easily reckoned with by hand: ten pages a second from the drive, ten tokens a second computed."""

from __future__ import annotations

from agentstate.benchmarks.calibration import Calibration

GB = 10**9
COST = Calibration(
    name="by hand",
    source="chosen",
    page_tokens=10,
    token_bytes=GB // 10,
    layers=4,
    chunk_tokens=1000,
    max_running=8,
    request_s=0.0,
    forward_s=0.0,
    token_s=0.1,
    pair_s=0.0,
    step_s=1.0,
    sequence_s=0.0,
    context_s=0.0,
    restore_gb_per_s=10.0,  # ten pages a second
    host_gb_per_s=100.0,
    write_gb_per_s=1000.0,
)
