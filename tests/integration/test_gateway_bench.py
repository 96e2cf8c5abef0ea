"""What `agentstate bench gateway` measures on: agents whose turns the gateway takes for turns of one session."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stage import Service, register

from agentstate.benchmarks import stand_in
from agentstate.benchmarks.gateway import ANSWER_CHUNKS, AT_ONCE, FIRST_MESSAGES, OURS, PACED, Agent, Target
from agentstate.benchmarks.streams import Connection

COMMAND = [sys.executable, "-m", "agentstate.cli", "bench", "gateway"]


def test_an_agents_turns_are_those_of_one_session(service: Service) -> None:
    with stand_in.replaying([stand_in.AT_ONCE_S]) as (base_url,), stand_in.control() as (address, secret):
        register(service.database, address, control_secret=secret, base_url=base_url, model=AT_ONCE)

        async def ask() -> list[str]:
            target = Target(OURS, {AT_ONCE: service.base_url})
            agent = Agent([target], seed=1)
            sessions = []
            for turn in range(3):
                if turn:
                    agent.go_on()
                body = agent.body(target)
                assert len(json.loads(body)["messages"]) == FIRST_MESSAGES + 2 * turn
                answer = await agent.ask(target, body)
                assert agent.followed(answer)
                assert answer.server_ms["begin"] < answer.server_ms["total"]
                sessions.append(answer.headers["x-agentstate-session"])
                while service.app.state.gateway.turns.ending:
                    await asyncio.sleep(0.005)
            agent.begin()
            answer = await agent.ask(target, agent.body(target))
            agent.close()
            return [*sessions, answer.headers["x-agentstate-session"]]

        first, second, third, other = asyncio.run(ask())
        assert first == second == third != other


def test_a_paced_chunk_says_when_it_is_due() -> None:
    async def ask(base_url: str) -> list[float]:
        connection = Connection(base_url)
        body = json.dumps({"model": PACED, "stream": True, "max_tokens": ANSWER_CHUNKS}).encode()
        answer = await connection.ask(body)
        connection.close()
        return answer.late_ms

    with stand_in.replaying([0.002]) as (base_url,):
        assert len(asyncio.run(ask(base_url))) == ANSWER_CHUNKS


def test_what_was_measured_is_printed_and_kept(tmp_path: Path) -> None:
    report = tmp_path / "gateway.json"
    arguments = ["--databases", "sqlite", "--agents", "1,2", "--turns", "2", "--streams", "3", "--rounds", "2"]
    arguments += ["--seconds", "0.2", "--requests", "20", "--json", str(report)]
    # Nothing else that forwards is found.
    environment = {**os.environ, "COLUMNS": "200", "PATH": "/usr/bin:/bin"}
    run = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    result = json.loads(report.read_text())
    measured = [(row["part"], row["target"]) for row in result["rows"]]
    turns = [("ttft", "engine"), ("ttft", "gateway")]
    assert measured == [*turns, *turns, ("chunks", "engine"), ("chunks", "gateway"), ("memory", "gateway")]
    chunks = result["rows"][-2]
    assert chunks["chunks"] > 0
    assert result["rows"][-1]["points"][-1]["requests"] == 20
    assert set(result["settings"]["left_out"]) == {"LiteLLM's proxy", "SGLang's router"}
    for shown in ("Time to first token", "Chunks", "Memory", "left out: SGLang's router: smg is not installed"):
        assert shown in run.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--databases", "oracle"], "oracle"), (["--agents", "one"], "--agents"), (["--litellm", "/none"], "/none")],
    ids=lambda given: given[0],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments: list[str], named: str) -> None:
    run = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
    assert run.returncode == 1
    assert len(run.stderr.strip().splitlines()) == 1
    assert named in run.stderr
