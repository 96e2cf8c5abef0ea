"""Turn 2 on several engines in one run: each in turn, again and again, and never two at once.

An engine is visited several times. At the first visit it computes the context and stores it; at every later one it has
just been restarted, and restores at its first request. Within a visit, hits and restores alternate, so that a ratio
compares what was measured seconds apart. Between visits all the others are measured, so that what drifts drifts for
all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import httpx

from agentstate.benchmarks.engine import Engine
from agentstate.benchmarks.peers.servers import Server
from agentstate.benchmarks.replay import unseen
from agentstate.benchmarks.ttft import OUTPUT, Prompts, Samples
from agentstate.errors import AgentStateError, EngineError

RESTORES = ("warm", "cold", "restart", "restart_cold")
_WHAT_PEERS_RAISE = (AgentStateError, httpx.HTTPError, OSError)


class Contender(Protocol):
    """One of the engines compared. All of them are asked the same prompts."""

    name: str
    visits: int | None
    """In how many visits it takes part; None: in all of them."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    async def ingest(self) -> None:
        """Compute the context and store it, on an engine that has just been started for the first time."""

    async def first_after_restart(self, number: int, cold: bool) -> None:
        """Restore on an engine that has just been restarted: from files alone if it is to be ``cold``."""

    async def round(self, number: int) -> None:
        """A hit, and what a restore costs after a flush, with the context on the device before and after."""

    def rows(self) -> list[dict[str, Any]]: ...


class PeerTurns:
    """Measures one context on a server of its own. A failure ends its part, and its rows say so."""

    def __init__(self, server: Server, model: str, prompts: Prompts, step: Callable[[], None]):
        self.name = server.name
        self.visits = None if server.stores else 1
        self._server = server
        self._model = model
        self._prompts = prompts
        self._step = step
        self._expected: list[Sequence[int]] = []
        self._samples: dict[str, Samples] = {}
        self._reason = server.why_not()
        self.trouble = ""

    @property
    def out(self) -> bool:
        """Whether it cannot take part, or not any more."""
        return self._reason is not None

    def give_up(self, error: Exception) -> None:
        """``trouble`` says everything; the rows have its first line, without what only introduces a log."""
        self.trouble = str(error) or repr(error)
        self._reason = self.trouble.splitlines()[0].partition("; the end of")[0]

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        self._server.stop()

    async def ingest(self) -> None:
        async with Engine(self._server.url) as engine:
            await engine.ask(unseen(64), 2)
            computed, self._expected = await self._prompts.compute(engine)
        # To an engine without a store, every start is like this one.
        self._of("recompute" if self._server.stores else "restart").add(computed, self._expected[0])
        self._step()
        self._server.settle()

    async def first_after_restart(self, number: int, cold: bool) -> None:
        if cold:
            self._server.forget()
        await self._measure("restart_cold" if cold else "restart", number)

    async def round(self, number: int) -> None:
        await self._measure("memory_hit", number)
        if not self._server.stores:
            if number == 0:  # it is computed again, which takes long and varies little
                self._server.flush()
                await self._measure("flush", number)
            return
        self._server.flush()
        await self._measure("warm", number)
        self._server.flush()
        self._server.forget()
        await self._measure("cold", number)

    def rows(self) -> list[dict[str, Any]]:
        """A row a variant that was measured, its name after the server's; a restore that brought back too little, or
        after which other tokens followed, is none: it has a ``reason`` and no ``ttft_s``."""
        tokens = len(self._prompts.context)
        rows = [samples.row(self._model, tokens, f"{self.name}_{name}") for name, samples in self._samples.items()]
        for row, name in zip(rows, self._samples, strict=True):
            # A page that the context fills only in part cannot be stored.
            whole = tokens // 64 * 64
            if name not in RESTORES or not self._server.stores:
                continue
            if row["restored_tokens"] < whole:
                row |= {"ttft_s": None, "reason": f"restored {row['restored_tokens']:,} of {whole:,} tokens"}
            elif not row["identical"]:
                row |= {"ttft_s": None, "reason": "other tokens followed than when it was a hit"}
        if self._reason is not None:
            rows.append(absent(self._model, tokens, self.name, self._reason))
        return rows

    async def _measure(self, variant: str, number: int) -> None:
        prompt, tail = self._prompts.number(number)
        before = self._server.bytes_read()
        async with Engine(self._server.url) as engine:
            answer = await engine.ask(prompt, OUTPUT, None)
        samples = self._of(variant)
        samples.add(answer, self._expected[tail])
        samples.bytes_read.append(self._server.bytes_read() - before)
        if variant == "memory_hit" and answer.device_tokens < len(self._prompts.context) // 64 * 64:
            raise EngineError(f"{answer.device_tokens:,} tokens were on the device, which had just had the context")
        self._step()

    def _of(self, variant: str) -> Samples:
        return self._samples.setdefault(variant, Samples())


def absent(model: str, tokens: int, name: str, reason: str) -> dict[str, Any]:
    """The row of a peer that could not be measured."""
    figures = dict.fromkeys(("ttft_s", "tokens_per_s", "bytes_read", "device_share", "identical"))
    return {"model": model, "tokens": tokens, "variant": name, **figures, "reason": reason}


async def compare(
    contenders: Sequence[Contender], visits: int, rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The rows of all contenders, after so many visits with ``rounds`` each. Every other restart is cold, beginning
    with the first. A failure of a `PeerTurns` ends the part of that one; any other is raised."""
    for visit in range(visits):
        for contender in contenders:
            peer = contender if isinstance(contender, PeerTurns) else None
            if (peer is not None and peer.out) or visit >= (contender.visits or visits):
                continue
            say(f"{contender.name}, visit {visit + 1} of {contender.visits or visits}")
            try:
                contender.start()
                await (contender.first_after_restart(visit, visit % 2 == 1) if visit else contender.ingest())
                for number in range(rounds):
                    await contender.round(number)
            except _WHAT_PEERS_RAISE as error:
                if peer is None:
                    raise
                peer.give_up(error)
            finally:
                contender.stop()
    return [row for contender in contenders for row in contender.rows()]
