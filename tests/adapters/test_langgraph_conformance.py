"""The whole conformance suite of LangGraph's checkpoint library, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from langgraph.checkpoint.conformance import checkpointer_test, validate

from agentstate.adapters.langgraph import AgentStateSaver
from agentstate.sql.database import Database

BASE = {"put": 17, "put_writes": 10, "get_tuple": 10, "list": 16, "delete_thread": 5}
EXTENDED = {"delete_for_runs": 7, "copy_thread": 8, "prune": 8}


@pytest.mark.parametrize("split_bytes", [4096, 0], ids=["as usual", "every list split"])
def test_conformance(database: Database, split_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentstate.adapters.langgraph.SPLIT_BYTES", split_bytes)

    @checkpointer_test(name="AgentStateSaver")
    async def saver() -> AsyncIterator[AgentStateSaver]:
        yield AgentStateSaver(database, model="m")

    report = asyncio.run(validate(saver))
    assert {name: result.failures for name, result in report.results.items() if result.failures} == {}
    assert {name: result.tests_passed for name, result in report.results.items()} == {**BASE, **EXTENDED}
    assert sum(BASE.values()) == 58
