"""`agentstate bench ttft --peers`, with the peer that needs nothing but SGLang: it stores, restores and is compared."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest

from agentstate.benchmarks.peers import servers
from agentstate.benchmarks.peers.comparison import PeerTurns, compare
from agentstate.benchmarks.peers.servers import FileLinkerServer
from agentstate.benchmarks.ttft import Prompts
from agentstate.cli.local import ChildProcess, Spawn

TOKENS = 512


def test_a_peer_restores_after_a_flush_and_after_a_restart(
    tmp_path: Path, smollm2: Path, engine_python: Path, fork: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "ChildProcess", partial(ChildProcess, start=fork))
    server = FileLinkerServer(tmp_path / "peer", smollm2, engine_python, ["--enable-metrics"])
    peer = PeerTurns(server, "smollm2", Prompts.of(TOKENS), lambda: None)
    rows = {row["variant"]: row for row in asyncio.run(compare([peer], visits=2, rounds=1, say=lambda text: None))}
    assert peer.trouble == ""
    assert set(rows) == {
        f"file_linker_{variant}" for variant in ("recompute", "memory_hit", "warm", "cold", "restart_cold")
    }
    for name in ("warm", "cold", "restart_cold"):
        row = rows[f"file_linker_{name}"]
        assert row["ttft_s"] is not None, row.get("reason")
        assert row["restored_tokens"] == TOKENS
        assert row["identical"]
        assert 0 < row["before_match_s"] < row["ttft_s"]
    pages = list(server.stored.rglob("*.pt"))
    assert len(pages) >= TOKENS // 64
    page_bytes = pages[0].stat().st_size
    assert rows["file_linker_cold"]["bytes_read"] >= TOKENS // 64 * page_bytes
    assert rows["file_linker_memory_hit"]["bytes_read"] < page_bytes
