"""What a tenant learns from the time of an answer: whether another tenant has said what it guesses.

In every round one tenant has a new prompt computed. Another one then asks for that prompt, a right guess, and for one
that nobody has said, a wrong guess, in either order. The first one asks for its own again, which shows how soon a right
guess would be answered if the two shared KV. All of this runs once with the prompt on the device, and once with it only
on disk. Every guess is made once: the guesser would find its own.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from agentstate.benchmarks import results
from agentstate.benchmarks.engine import Answer, Engine
from agentstate.benchmarks.replay import unseen
from agentstate.benchmarks.stacks import running, steps
from agentstate.benchmarks.terminal import console
from agentstate.benchmarks.ttft import TAIL, interval, paired_ratio
from agentstate.cli.local import LocalStack
from agentstate.client import Client
from agentstate.errors import EngineError
from agentstate.sessions import tenants
from agentstate.settings import Settings
from agentstate.sql.database import Database


class Guess(StrEnum):
    RIGHT = "right"
    WRONG = "wrong"
    OWN = "own"


class Tenant:
    """A tenant with a key of its own, and a session whose turn lasts."""

    def __init__(self, stack: LocalStack, name: str):
        database = Database(Settings(home=stack.home, database_url="").sqlalchemy_url)
        try:
            with database.write() as connection:
                key = tenants.create_key(connection, name).secret
        finally:
            database.close()
        with Client(stack.service_url, api_key=key) as client:
            link = client.resume(client.create_session(stack.model).id, lease_ttl_s=86400).engine
        if link is None:
            raise EngineError("the engine has not told the service that it is there")
        self._sent = link.extra_body

    async def asks(self, engine: Engine, prompt: Sequence[int]) -> Answer:
        return await engine.ask(prompt, 1, self._sent["session_id"], cache_salt=self._sent["cache_salt"])


class Guesses:
    """Measures prompts of so many ``tokens`` on one stack. ``say`` is told what is being done; ``step`` is called after
    every round."""

    def __init__(self, stack: LocalStack, tokens: int, say: Callable[[str], None], step: Callable[[], None]):
        self._stack = stack
        self._tokens = tokens
        self._say = say
        self._step = step

    async def run(self, rounds: int) -> list[dict[str, Any]]:
        """A row for prompts on the device and one for prompts on disk: times to first token, and their ratios over the
        rounds. Raises EngineError if a guesser found anything, or a tenant did not find its own."""
        owner, guesser = Tenant(self._stack, "owner"), Tenant(self._stack, "guesser")
        found: dict[str, dict[Guess, list[float]]] = {
            place: {guess: [] for guess in Guess} for place in ("device", "disk")
        }
        async with Engine(self._stack.engine_url) as engine:
            for number in range(rounds):
                for place, samples in found.items():
                    self._say(f"round {number + 1}, on {place}")
                    said = unseen(self._tokens)
                    await owner.asks(engine, said)
                    self._stack.settle()
                    if place == "disk":
                        self._stack.flush_device()
                    for guess in (Guess.RIGHT, Guess.WRONG)[:: -1 if number % 2 else 1]:
                        prompt = said if guess is Guess.RIGHT else unseen(self._tokens)
                        answer = await guesser.asks(engine, prompt)
                        if answer.device_tokens or answer.restored_tokens:
                            raise EngineError(f"a {guess} guess was answered with another tenant's KV")
                        samples[guess].append(answer.ttft_s)
                        self._stack.settle()
                    own = await owner.asks(engine, [*said, *unseen(TAIL)])
                    if not own.device_tokens + own.restored_tokens:
                        raise EngineError("a tenant did not find its own prompt")
                    samples[Guess.OWN].append(own.ttft_s)
                    self._stack.settle()
                self._step()
        return [self._row(place, samples) for place, samples in found.items()]

    def _row(self, place: str, samples: dict[Guess, list[float]]) -> dict[str, Any]:
        row: dict[str, Any] = {"place": place, "tokens": self._tokens}
        for guess, ttft_s in samples.items():
            row[f"{guess}_ttft_s"] = round(statistics.median(ttft_s), 4)
            row[f"{guess}_ttft_all_s"] = [round(seconds, 4) for seconds in ttft_s]
        for guess in (Guess.RIGHT, Guess.OWN):
            ratio, low, high = paired_ratio(samples[guess], samples[Guess.WRONG])
            row[f"{guess}_to_wrong"] = round(ratio, 4)
            row[f"{guess}_to_wrong_95"] = [round(low, 4), round(high, 4)]
        return row


def guesses(settings: Settings, model: str, tokens: int, rounds: int, report: Path | None) -> None:
    """Print and keep the times in which right and wrong guesses at another tenant's prompts are answered."""
    arguments = ["--skip-tokenizer-init", "--context-length", str(tokens + 256)]
    arguments += ["--max-total-tokens", str(8 * (tokens + 256))]
    with running(settings, model, arguments, AGENTSTATE_BREAK_EVEN="off") as stack, steps(rounds) as bar:
        rows = asyncio.run(Guesses(stack, tokens, *bar).run(rounds))
    numbers = ["right, s", "wrong, s", "right ÷ wrong", "95 %", "its own, s", "own ÷ wrong", "95 %"]
    table = Table("the prompt is on", *(Column(name, justify="right") for name in numbers))
    for row in rows:
        cells = [f"{row['right_ttft_s']:.3f}", f"{row['wrong_ttft_s']:.3f}"]
        cells += [f"{row['right_to_wrong']:.3f}", interval(row["right_to_wrong_95"]), f"{row['own_ttft_s']:.3f}"]
        cells += [f"{row['own_to_wrong']:.3f}", interval(row["own_to_wrong_95"])]
        table.add_row(row["place"], *cells)
    console.print(table)
    if report is not None:
        asked = {"model": model, "tokens": tokens, "rounds": rounds}
        results.write(report, results.record("guesses", asked, rows))
        console.print(f"raw result written to {report}")
