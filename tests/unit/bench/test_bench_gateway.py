"""How `agentstate bench gateway` reads streams, and what it makes of what it measured."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from agentstate.benchmarks import gateway
from agentstate.benchmarks.forwarders import LITELLM, ROUTER
from agentstate.benchmarks.gateway import DIRECT, OURS, Paced, Turns
from agentstate.benchmarks.streams import Answer, Connection
from agentstate.errors import EngineRefused, SettingsError

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"Server-Timing: begin;dur=1.5\r\nserver-timing: total;dur=2.25\r\n\r\n"
)
END = b"0\r\n\r\n"


def framed(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


def timed(due_ns: int, space: bytes = b"") -> bytes:
    return framed(b'data: {"choices":[{"delta":{"content":%b"%017d "}}]}\n\n' % (space, due_ns))


class Wire(asyncio.Transport):
    """A connection whose other side sends ``parts`` as soon as it is asked."""

    def __init__(self, connection: Connection, parts: Sequence[bytes]):
        super().__init__()
        self._connection = connection
        self._parts = parts

    def write(self, data: Any) -> None:
        for part in self._parts:
            asyncio.get_running_loop().call_soon(self._connection.data_received, part)

    def abort(self) -> None: ...


def received(*parts: bytes) -> tuple[Answer, list[float]]:
    async def ask() -> Answer:
        connection.connection_made(Wire(connection, parts))
        return await connection.ask(b"{}")

    late_ms: list[float] = []
    connection = Connection("http://127.0.0.1:1", late_ms.append)
    return asyncio.run(ask()), late_ms


@given(st.lists(st.integers(1, 700), max_size=8, unique=True), st.sampled_from([b"", b" "]))
def test_a_stream_is_read_alike_however_it_is_cut(cuts: list[int], space: bytes) -> None:
    whole = HEAD + b"".join(timed(due, space) for due in (1, 2, 3)) + framed(b"data: [DONE]\n\n") + END
    edges = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    answer, late_ms = received(*(whole[first:last] for first, last in zip(edges, edges[1:], strict=False)))
    assert len(answer.late_ms) == 3
    assert late_ms == answer.late_ms
    # They were due when the machine started.
    assert min(answer.late_ms) > 0
    assert answer.ttft_ms > 0
    assert answer.server_ms == {"begin": 1.5, "total": 2.25}


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (HEAD + framed(b'data: {"error":{"message":"broken"}}\n\n') + framed(b"data: [DONE]\n\n") + END, "broken"),
        (b"HTTP/1.1 503 X\r\ncontent-length: 2\r\n\r\nno", "503"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "not a stream"),
    ],
    ids=["error", "status", "whole"],
)
def test_what_is_no_whole_stream_is_no_measurement(sent: bytes, said: str) -> None:
    with pytest.raises(EngineRefused, match=said):
        received(sent)


def turns() -> Turns:
    return Turns(
        {DIRECT: [1.0, 5.0, 1.0], OURS: [3.0, 8.0, 5.0]}, begin_ms=[1.0, 2.0, 3.0], cpu_s={OURS: 0.0369}, strayed=1
    )


def test_what_is_added_is_the_difference_turn_by_turn() -> None:
    direct, ours = turns().rows("sqlite", 1)
    assert "added_p50_ms" not in direct
    assert (ours["ttft_p50_ms"], ours["added_p50_ms"], ours["added_p99_ms"]) == (5.0, 3.0, 4.0)
    assert (ours["begin_p50_ms"], ours["cpu_ms"]) == (2.0, 12.3)
    low, high = ours["added_p50_95"]
    assert 2.0 <= low <= 3.0 <= high <= 4.0


def test_the_interval_of_a_quantile_is_that_of_its_samples() -> None:
    assert gateway.bounds([2.0] * 9, "p99") == [2.0, 2.0]
    low, high = gateway.bounds([float(value) for value in range(101)], "p50")
    assert 30 < low < 50 < high < 70


def rounds() -> dict[str, list[Paced]]:
    direct = [Paced([1.0] * 100, None, 1) for _ in range(3)]
    ours = [Paced([1.0] * 50 + [late] * 50, cpu_s, 1) for late, cpu_s in ((3.0, 0.02), (9.0, 0.03), (4.0, 0.01))]
    return {DIRECT: direct, OURS: ours}


def test_chunks_are_compared_round_by_round() -> None:
    direct, ours = gateway.chunk_rows("sqlite", 64, rounds())
    assert direct["late_p99_ms"] == 1.0
    assert "cpu_s_per_1000" not in direct
    assert (ours["added_p99_ms"], ours["added_p99_range_ms"]) == (3.0, [2.0, 8.0])
    assert (ours["cpu_s_per_1000"], ours["cpu_s_per_1000_range"]) == (0.2, [0.1, 0.3])


def test_tables_show_what_was_measured_and_remarks_the_rest() -> None:
    points = [{"requests": number * 10, "rss_mb": rss} for number, rss in enumerate((100.0, 110.0, 112.0))]
    memory = {"part": "memory", "database": "sqlite", "target": OURS, "points": points}
    rows = [*turns().rows("sqlite", 4), *gateway.chunk_rows("sqlite", 64, rounds()), memory]
    output = StringIO()
    console = Console(file=output, width=200)
    for table in gateway.tables(rows):
        console.print(table)
    shown = output.getvalue()
    for expected in ("3.00 (", "4.00 (", "3.0 (2.0–8.0)", "0.200 (0.100–0.300)", "110.0", "15", "20", "0.3", "12.3"):
        assert expected in shown
    assert len(list(gateway.tables(rows[:2]))) == 1
    strayed, grown = gateway.remarks(rows)
    assert "1 requests were not taken" in strayed
    assert "from 100.0 MB to 112.0 MB in 20 requests, +2.0 MB in the second half" in grown


def test_each_forwarder_is_told_where_the_engines_are(tmp_path: Path) -> None:
    engines = {"a": "http://127.0.0.1:1/v1", "b": "http://127.0.0.1:2/v1"}
    command = LITELLM.command(engines, 7, tmp_path)
    assert command[command.index("--port") + 1] == "7"
    models = json.loads(Path(command[command.index("--config") + 1]).read_text())["model_list"]
    assert {each["model_name"]: each["litellm_params"]["api_base"] for each in models} == engines
    command = ROUTER.command({"a": engines["a"]}, 8, tmp_path)
    assert command[command.index("--worker-urls") + 1] == "http://127.0.0.1:1"


def test_a_forwarder_is_where_the_user_says_or_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert LITELLM.find(None) is None
    with pytest.raises(SettingsError, match="litellm"):
        LITELLM.find(str(tmp_path / "litellm"))
    executable = tmp_path / "litellm"
    executable.write_text("#!/bin/sh\n")
    executable.chmod(0o700)
    assert LITELLM.find(None) == LITELLM.find(str(executable)) == executable
