from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentstate.benchmarks import device, report, results
from agentstate.benchmarks.engine import Answer
from agentstate.benchmarks.peers.comparison import PeerTurns, absent, compare
from agentstate.benchmarks.peers.servers import SERVERS, HiCache, LMCache, RadixCache, Server
from agentstate.benchmarks.ttft import Prompts, Samples, floor_of
from agentstate.cli.local import ChildProcess
from agentstate.errors import EngineError

PYTHON = Path(sys.executable)
PROMPTS = Prompts(context=list(range(200)), tails=[[1], [2], [3]])
WHOLE = 192


class Scripted(Server):
    """A server that is no process."""

    name = "scripted"

    def start(self) -> None:
        self.url = "http://127.0.0.1:1"

    def _flags(self) -> list[str]:
        return []


class Visited:
    """A contender that notes what is asked of it; its engine must not run beside another."""

    running = 0

    def __init__(self, name: str, log: list[str], visits: int | None = None):
        self.name, self.visits, self._log = name, visits, log

    def start(self) -> None:
        Visited.running += 1
        assert Visited.running == 1

    def stop(self) -> None:
        Visited.running -= 1

    async def ingest(self) -> None:
        self._log.append(f"{self.name} ingest")

    async def first_after_restart(self, number: int, cold: bool) -> None:
        self._log.append(f"{self.name} {'cold' if cold else 'warm'}")

    async def round(self, number: int) -> None:
        self._log.append(f"{self.name} {number}")

    def rows(self) -> list[dict[str, Any]]:
        return [{"variant": self.name}]


def answer(tokens: tuple[int, ...], restored: int) -> Answer:
    return Answer(tokens, 0, restored, ttft_s=0.5, total_s=2.5, before_match_s=0.05)


def turns(tmp_path: Path, **samples: Answer) -> PeerTurns:
    """What was measured of a server that continues with token 7."""
    measured = PeerTurns(Scripted(tmp_path / "home", tmp_path, PYTHON, []), "m", PROMPTS, lambda: None)
    for variant, given in samples.items():
        measured._samples[variant] = Samples()
        measured._samples[variant].add(given, [7])
    return measured


def test_engines_are_visited_in_turn_and_restarted_cold_first() -> None:
    log: list[str] = []
    rows = asyncio.run(compare([Visited("a", log), Visited("b", log, visits=1)], 3, 1, lambda text: None))
    assert log == ["a ingest", "a 0", "b ingest", "b 0", "a cold", "a 0", "a warm", "a 0"]
    assert [row["variant"] for row in rows] == ["a", "b"]
    assert Visited.running == 0


def test_a_peer_that_does_not_answer_ends_its_own_part_only(tmp_path: Path) -> None:
    log: list[str] = []
    rows = asyncio.run(compare([turns(tmp_path), Visited("a", log)], 2, 1, lambda text: None))
    assert log == ["a ingest", "a 0", "a cold", "a 0"]
    assert rows[0]["variant"] == "scripted"
    assert rows[0]["ttft_s"] is None
    assert "127.0.0.1:1" in rows[0]["reason"]


def test_what_goes_wrong_with_this_store_is_raised() -> None:
    class Broken(Visited):
        async def ingest(self) -> None:
            raise EngineError("no")

    with pytest.raises(EngineError, match="no"):
        asyncio.run(compare([Broken("a", [])], 1, 1, lambda text: None))
    assert Visited.running == 0


def test_a_restore_counts_when_it_brought_all_pages_and_the_same_tokens(tmp_path: Path) -> None:
    found = turns(tmp_path, warm=answer((7,), WHOLE), cold=answer((7,), 64), restart=answer((8,), WHOLE)).rows()
    rows = {row["variant"]: row for row in found}
    assert rows["scripted_warm"]["ttft_s"] == 0.5
    assert rows["scripted_cold"]["ttft_s"] is None
    assert rows["scripted_cold"]["reason"] == "restored 64 of 192 tokens"
    assert rows["scripted_restart"]["ttft_s"] is None
    assert rows["scripted_restart"]["identical"] is False


def test_a_peer_that_cannot_run_here_is_a_row_with_the_reason(tmp_path: Path) -> None:
    lmcache = LMCache(tmp_path / "home", tmp_path, tmp_path / "no" / "python", [])
    (row,) = PeerTurns(lmcache, "m", PROMPTS, lambda: None).rows()
    assert row["variant"] == "lmcache"
    assert "make setup-lmcache" in row["reason"]
    assert row["ttft_s"] is None


def test_an_interpreter_without_lmcache_will_not_do(tmp_path: Path) -> None:
    assert LMCache(tmp_path / "home", tmp_path, PYTHON, []).why_not() is not None


def test_every_restore_is_measured_against_the_hit_of_its_own_engine() -> None:
    assert floor_of("restore_cold") == floor_of("api_resume") == floor_of("recompute") == "memory_hit"
    assert floor_of("restore_first_after_restart") == "memory_hit_after_restart"
    for server in SERVERS:
        for variant in ("memory_hit", "warm", "cold", "restart", "restart_cold", "recompute", "flush"):
            assert floor_of(f"{server.name}_{variant}") == f"{server.name}_memory_hit"


def test_a_server_settles_when_nothing_is_written_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentstate.benchmarks.peers.servers._STILL_S", 0.0)
    monkeypatch.setattr("agentstate.benchmarks.peers.servers._SETTLE_S", 0.5)
    server = Scripted(tmp_path / "home", tmp_path, PYTHON, [])
    with pytest.raises(EngineError, match="scripted has stored 0 bytes"):
        server.settle()
    (server.stored / "a" / "b").mkdir(parents=True)
    (server.stored / "a" / "b" / "page").write_bytes(bytes(10))
    server.settle()
    assert server.stored_bytes() == 10
    server.delete()
    assert not server.home.exists()


def test_the_radix_cache_alone_stores_nothing(tmp_path: Path) -> None:
    RadixCache(tmp_path / "home", tmp_path, PYTHON, []).settle()


def test_hicache_on_a_cpu_has_a_plug_in_that_sglang_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentstate.cli.launcher.has_cuda", lambda: False)
    environment = HiCache(tmp_path / "home", tmp_path, PYTHON, [])._environment()
    program = (
        "from importlib.metadata import entry_points\n"
        "print([p.value for p in entry_points(group='sglang.srt.plugins') if p.name == 'agentstate_benchmark'])"
    )
    run = subprocess.run([PYTHON, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.stdout.strip() == "['agentstate.benchmarks.peers.hicache_on_cpu:register']"


def test_bytes_read_are_those_of_the_drive_and_of_the_whole_group(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(os.urandom(1 << 20))
    device.drop_from_page_cache([data, tmp_path / "gone"])
    program = f"import subprocess, sys; subprocess.run(['cat', {str(data)!r}]); print('x', flush=True); input()"
    reader = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert len(reader.stdout.read((1 << 20) + 1)) == (1 << 20) + 1
        # What a child has read counts for its parent once it has ended.
        assert device.bytes_read(reader.pid) >= 1 << 20
    finally:
        reader.communicate(b"\n")


def test_a_child_that_ends_at_once_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    child = ChildProcess([sys.executable, "-c", "print('broken')"], os.environ, tmp_path / "x.log")
    with pytest.raises(EngineError, match="broken"):
        child.await_answer("http://127.0.0.1:1/", 30)
    assert child.terminate(5)


def test_a_report_has_each_peer_against_its_own_hit_and_says_why_one_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = turns(tmp_path, memory_hit=answer((7,), 0), cold=answer((7,), WHOLE)).rows()
    rows[0] |= {"ttft_s": 0.25, "ttft_all_s": [0.25]}
    rows.append(absent("m", 200, "lmcache", "not set up"))
    results.write(tmp_path / "raw" / "ttft.json", results.record("ttft", {}, rows, [PYTHON]))
    report.write(tmp_path / "raw", tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text()
    assert "| 200 | scripted: cold | 0.500 | 0.0500 |  |  | 2.000 |  |" in page
    assert "| 200 | LMCache | not set up |" in page
