"""Agents that go on after their KV has left the device, beside agents that say the same and were never suspended.

An agent has two turns, the second of which has all of the first before it. What its second turn should say is asked of
the same engine, under another salt, when its first turn was computed a moment ago: with the same kernels on as many
tokens.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from agentstate.benchmarks.drafting import VOCABULARY
from agentstate.benchmarks.engine import Answer, Engine
from agentstate.cli.local import LocalStack
from agentstate.errors import EngineError

_QUESTION, _ANSWER, _NEXT, _OUTPUT = 300, 64, 30, 64


class Event(StrEnum):
    """What happens between two turns."""

    FLUSH = "flush"  # the device's cache is emptied
    KILL = "kill -9"  # the engine is killed, once it has stored everything, and started again


class Contender(Protocol):
    """An engine that keeps KV in some way."""

    name: str

    @property
    def url(self) -> str: ...

    def start(self) -> None: ...

    def settle(self) -> object:
        """Wait until what was computed is stored."""

    def flush(self) -> None: ...

    def stop(self) -> None:
        """SIGKILL."""


@dataclass
class Ours:
    """A stack of ours, ready to be started."""

    stack: LocalStack
    name: str = "agentstate"

    @property
    def url(self) -> str:
        return self.stack.engine_url

    def start(self) -> None:
        self.stack.start_engine(*self.stack.engine_arguments)

    def settle(self) -> object:
        return self.stack.settle()

    def flush(self) -> None:
        self.stack.flush_device()

    def stop(self) -> None:
        self.stack.kill_engine()


class Pair(NamedTuple):
    """The second turn of an agent that was never suspended, and of one that was."""

    never_evicted: Answer
    resumed: Answer

    @property
    def same(self) -> bool:
        """Whether the tokens are the same, and were verified in as many steps, if they were drafted."""
        one, other = self
        return (one.tokens, one.steps) == (other.tokens, other.steps)

    @property
    def whole(self) -> bool:
        """Whether all that the one found on the device was restored for the other."""
        return self.resumed.restored_tokens >= self.never_evicted.device_tokens


async def resume(
    contender: Contender,
    event: Event,
    agents: int,
    *,
    warm: bool = False,
    fields: Mapping[str, Any] | None = None,
) -> list[Pair]:
    """Have so many agents say something to a running engine, and go on after ``event``. An engine drafts from all that
    it has said since it was flushed, if it is ``warm`` (NGRAM): both are then asked when it has said the same.
    ``fields`` are of each request. Raises EngineError if what was never evicted is not on the device."""
    going_on = [_Agent(random.Random(f"{event} {number}"), fields or {}) for number in range(agents)]
    async with Engine(contender.url) as engine:
        for agent in going_on:
            await agent.begin(engine)
    contender.settle()
    if event is Event.FLUSH:
        contender.flush()
    else:
        contender.stop()
        contender.start()
    async with Engine(contender.url) as engine:
        return [
            Pair(await agent.never_evicted(engine, 2 if warm else 1), await agent.go_on(engine)) for agent in going_on
        ]


class _Agent:
    def __init__(self, source: random.Random, fields: Mapping[str, Any]):
        self._question, self._next = (source.choices(range(100, VOCABULARY), k=n) for n in (_QUESTION, _NEXT))
        self._answer: tuple[int, ...] = ()
        self._salt = uuid.uuid4().hex
        self._fields = fields

    async def begin(self, engine: Engine, salt: str | None = None) -> None:
        answer = await engine.ask(self._question, _ANSWER, cache_salt=salt or self._salt, fields=self._fields)
        self._answer = self._answer or answer.tokens

    async def go_on(self, engine: Engine, salt: str | None = None) -> Answer:
        prompt = [*self._question, *self._answer, *self._next]
        return await engine.ask(prompt, _OUTPUT, cache_salt=salt or self._salt, fields=self._fields)

    async def never_evicted(self, engine: Engine, times: int) -> Answer:
        for _ in range(times):
            salt = uuid.uuid4().hex
            await self.begin(engine, salt)
            found = await self.go_on(engine, salt)
            if found.restored_tokens or not found.device_tokens:
                raise EngineError("what was computed a moment ago is not on the device any more")
        return found
