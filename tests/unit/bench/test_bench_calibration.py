from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentstate.benchmarks.calibration import Calibration
from agentstate.benchmarks.commands import control_of
from agentstate.errors import EngineUnreachable, SettingsError
from agentstate.fleet import engines
from agentstate.fleet.engines import Engine
from agentstate.sql.database import Database

FIXED = {
    "name": "x",
    "source": "y",
    "page_tokens": 64,
    "token_bytes": 1000,
    "layers": 4,
    "chunk_tokens": 2048,
    "max_running": 8,
    "request_s": 0.01,
    "restore_gb_per_s": 1.0,
    "host_gb_per_s": 2.0,
    "write_gb_per_s": 1.0,
}


def record(forward_s: float, token_s: float, pair_s: float, step_s: float, context_s: float) -> dict[str, Any]:
    truth = Calibration(
        **FIXED,
        forward_s=forward_s,
        token_s=token_s,
        pair_s=pair_s,
        step_s=step_s,
        sequence_s=0.001,
        context_s=context_s,
    )
    prefill = [
        {"cached": cached, "new": new, "seconds": FIXED["request_s"] + truth.prefill_s(cached, new)}
        for cached in (0, 1024, 8192)
        for new in (64, 1024, 8192)
    ]
    decode = [
        {"sequences": count, "context_tokens": context, "seconds": truth.decode_s(count, context)}
        for count in (1, 4)
        for context in (100, 10_000)
    ]
    return {**FIXED, "prefill": prefill, "decode": decode}


@given(
    st.floats(1e-4, 1), st.one_of(st.just(0.0), st.floats(1e-6, 1e-2)), st.floats(1e-9, 1e-6), st.floats(1e-4, 1e-1),
    st.one_of(st.just(0.0), st.floats(1e-8, 1e-5)),
)  # fmt: skip
def test_the_fit_gives_back_costs_that_explain_every_point(
    forward_s: float, token_s: float, pair_s: float, step_s: float, context_s: float
) -> None:
    points = record(forward_s, token_s, pair_s, step_s, context_s)
    fitted = Calibration.fit(points)
    for point in points["prefill"]:
        seconds = fitted.request_s + fitted.prefill_s(point["cached"], point["new"])
        assert seconds == pytest.approx(point["seconds"], rel=1e-3)
    for point in points["decode"]:
        assert fitted.decode_s(point["sequences"], point["context_tokens"]) == pytest.approx(point["seconds"], rel=1e-3)


def test_no_cost_is_negative_where_measurements_are_noisy() -> None:
    points = record(0.01, 1e-4, 1e-9, 0.01, 1e-7)
    points["prefill"][0]["seconds"] *= 3
    fitted = asdict(Calibration.fit(points))
    assert all(fitted[name] >= 0 for name in ("forward_s", "token_s", "pair_s", "step_s", "sequence_s", "context_s"))


def test_what_a_record_leaves_out_is_nothing() -> None:
    points = record(0.01, 1e-4, 1e-9, 0.01, 1e-7)
    fitted = Calibration.fit(points)
    assert (fitted.read_s, fitted.write_s, fitted.restore_s, fitted.late_results) == (0.0, 0.0, 0.0, False)
    assert fitted.cold_s(100.0) == 0.0
    told = {"read_s": 0.5, "write_s": 0.25, "restore_s": 0.125, "late_results": True, "idle": [[1.0, 0.1], [3.0, 0.5]]}
    given = Calibration.fit({**points, **told})
    assert (given.read_s, given.write_s, given.restore_s, given.late_results) == (0.5, 0.25, 0.125, True)
    assert given.read_all_s(10**9) == 0.5 + 1.0
    assert [given.cold_s(idle_s) for idle_s in (0.0, 0.5, 2.0, 9.0)] == pytest.approx([0.0, 0.05, 0.3, 0.5])


@pytest.mark.parametrize("name", Calibration.shipped())
def test_every_shipped_record_loads_and_fits_its_points(name: str) -> None:
    calibration = Calibration.load(name)
    assert calibration.name == name
    assert calibration.source
    assert calibration.prefill_s(0, 8192) > calibration.prefill_s(4096, 4096) > 0


def test_a_missing_or_broken_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no-such.*qwen2.5-7b-projected"):
        Calibration.load("no-such")
    (tmp_path / "record.json").write_text(json.dumps(FIXED))
    with pytest.raises(SettingsError, match="record.json.*prefill"):
        Calibration.load(tmp_path / "record.json")


def test_the_first_rank_of_the_engine_at_a_url_is_found(database: Database) -> None:
    with database.write() as connection:
        for rank in (1, 0):
            address = f"tcp://127.0.0.1:{5000 + rank}"
            engine = Engine(f"eng_{rank}", "n1", rank, address, "http://127.0.0.1:30000/v1", "m", "f1", "/pages")
            engines.register(connection, engine)
    assert control_of(database, "http://127.0.0.1:30000/", 10).address == "tcp://127.0.0.1:5000"
    with pytest.raises(EngineUnreachable, match="30001.*http://127.0.0.1:30000/v1"):
        control_of(database, "http://127.0.0.1:30001", 10)
