"""An agent that is suspended and resumed again and again must say what it would have said: greedy tokens, compared one
by one.

Conversations are run twice: once never suspended, while nothing is stored, and once with an event before every turn.
The prompts are the same, so every difference is the store's doing. With drafts, verifications are counted as well: a
draft model without its KV says nothing wrong, and is hardly ever accepted.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import httpx

from agentstate.benchmarks import drafting
from agentstate.benchmarks.engine import Answer, Engine
from agentstate.benchmarks.replay import VOCABULARY
from agentstate.benchmarks.speculation import ALGORITHMS
from agentstate.benchmarks.stacks import SMOLLM2, controls, settle
from agentstate.cli.local import LocalStack
from agentstate.errors import EngineError
from agentstate.sessions.outcomes import Resumed
from agentstate.settings import Settings

# In bfloat16, which CPUs with AMX compute in, a token in another batch or chunk may round to another answer.
_EXACT = ("--dtype", "float32", "--chunked-prefill-size", "512")
_TINY = (*_EXACT, "--skip-tokenizer-init")


@dataclass(frozen=True)
class Mode:
    """A kind of engine: its ``model``, of the token ids ``vocabulary``, and SGLang's ``flags``, with those of an
    ``algorithm`` of `ALGORITHMS` if it drafts. ``dp_size`` is how many DP ranks it has;
    ``longest`` after how many tokens a conversation is not gone on with."""

    model: str
    flags: tuple[str, ...]
    vocabulary: Sequence[int] = range(100, drafting.VOCABULARY)
    algorithm: str | None = None
    dp_size: int = 1
    longest: int = 1500

    def arguments(self, settings: Settings) -> tuple[str, ...]:
        """SGLang's, with the checkpoint of a draft model, which is made if it does not exist."""
        return self.flags if self.algorithm is None else (*self.flags, *ALGORITHMS[self.algorithm].arguments(settings))

    @property
    def counts_steps(self) -> bool:
        """Whether equal tokens take equally many verifications. What NGRAM drafts follows from all that the engine has
        said, and not from the conversation alone."""
        return self.algorithm is not None and ALGORITHMS[self.algorithm].keeps


MODES = {
    "plain": Mode(SMOLLM2, _EXACT, VOCABULARY, longest=3000),
    **{name: Mode(of.model, _TINY, algorithm=name) for name, of in ALGORITHMS.items()},
    "dp": Mode("tiny-target", (*_TINY, "--dp-size", "2"), dp_size=2),
    "dp-attention": Mode("tiny-mtp", (*_TINY, "--tp-size", "2", "--attn-dp-size", "2"), dp_size=2),
}
"""By their names on the command line."""


class Event(StrEnum):
    """What happens before a turn."""

    FLUSH = "flush"  # the device's cache is emptied
    HOST = "host prefetch"  # and the pages are read to host memory
    DEVICE = "device prefetch"  # or brought back to the device
    CANCEL = "cancelled request"  # a request of the same session is cancelled while it restores
    CROWD = "crowd"  # other conversations restore at the same time
    STOP = "restart"  # the engine is told to end, and restarted
    KILL = "kill -9"  # the engine is killed, and restarted
    MOVE = "move"  # after a flush another DP rank is asked


_WEIGHTS = {Event.FLUSH: 5, Event.HOST: 3, Event.DEVICE: 3, Event.CANCEL: 3, Event.CROWD: 2}


@dataclass(frozen=True)
class Turn:
    """``prompt`` is what a request of ``conversation`` sends, the whole context; ``output_tokens`` how many it asks
    for."""

    conversation: int
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass
class Outcome:
    """``points`` of each event, ``restored_tokens`` in all, and the turns whose tokens were not those of the
    reference, or were verified in more or fewer steps."""

    points: Counter[str] = field(default_factory=Counter)
    restored_tokens: int = 0
    different: list[dict[str, Any]] = field(default_factory=list)


class Soak:
    """``turns`` in all, over conversations that begin anew, share a beginning with an earlier one or fork from it.
    Everything follows from ``seed``. ``restarts`` of the events restart the engine, half of them after SIGKILL. The
    stack's engine is one of ``mode``."""

    def __init__(
        self,
        stack: LocalStack,
        mode: Mode = MODES["plain"],
        *,
        turns: int,
        restarts: int,
        seed: int,
        longest: int,
        step: Callable[[], None],
    ):
        self._stack = stack
        self._mode = mode
        self._turns = turns
        self._restarts = restarts
        self._random = random.Random(seed)
        self._longest = longest
        self._step = step
        self._salt = f"soak-{seed}-{time.time_ns()}"

    async def run(self) -> Outcome:
        """Raises EngineError if something is restored for the conversations that are never suspended."""
        self._store(False)
        try:
            reference = await self._reference()
        finally:
            self._store(True)
        self._stack.flush_device()
        return await self._suspended(reference)

    def _store(self, on: bool) -> None:
        """Have the engine store what it computes from now on, or not."""
        for rank in controls(self._stack, self._mode.dp_size):
            rank.call("spill", 60, on=on)

    async def _reference(self) -> list[tuple[Turn, Answer]]:
        """The conversations as they go when nothing happens. Each stays with one DP rank."""
        found: list[tuple[Turn, Answer]] = []
        contexts: list[list[int]] = []
        async with Engine(self._stack.engine_url) as engine:
            while len(found) < self._turns:
                conversation = self._choose(contexts)
                context = contexts[conversation]
                context += self._tokens(self._random.randrange(5, 180))
                turn = Turn(conversation, tuple(context), self._random.choice((1, 4, 12)))
                at = self._on(conversation)
                salt = f"{self._salt}-reference"
                answer = await engine.ask(context, turn.output_tokens, cache_salt=salt, fields=at)
                if answer.restored_tokens:
                    raise EngineError("an engine that stores nothing has restored something")
                found.append((turn, answer))
                context += answer.tokens
                self._step()
        return found

    def _choose(self, contexts: list[list[int]]) -> int:
        going_on = [i for i, context in enumerate(contexts) if len(context) < self._longest]
        kind = self._random.random()
        if not going_on or kind < 0.1:
            contexts.append(self._tokens(self._random.randrange(100, 900)))
        elif kind < 0.2:
            # Fork anywhere, at a page's border or not.
            origin = self._random.choice(contexts)
            contexts.append(origin[: self._random.randrange(1, len(origin) + 1)])
        else:
            return self._random.choice(going_on)
        return len(contexts) - 1

    async def _suspended(self, reference: list[tuple[Turn, Answer]]) -> Outcome:
        outcome, sessions = Outcome(), dict[int, Resumed]()
        restarts = set(self._random.sample(range(1, len(reference)), min(self._restarts, len(reference) - 1)))
        for number, (turn, right) in enumerate(reference):
            event = self._event(number in restarts)
            if turn.conversation not in sessions:
                sessions[turn.conversation] = self._stack.begin_turn()
            session = sessions[turn.conversation]
            await self._happen(event, session, turn, [before for before, _ in reference[:number]])
            elsewhere = self._on(self._random.randrange(self._mode.dp_size)) if event is Event.MOVE else None
            async with Engine(self._stack.engine_url) as engine:
                answer = await engine.ask(
                    turn.prompt,
                    turn.output_tokens,
                    session.engine_session,
                    cache_salt=self._salt,
                    fields=elsewhere,
                )
            outcome.points[event] += 1
            outcome.restored_tokens += answer.restored_tokens
            if answer.tokens != right.tokens or (self._mode.counts_steps and answer.steps != right.steps):
                outcome.different.append(_difference(number, event, turn, right, answer))
            self._step()
        return outcome

    def _on(self, number: int) -> dict[str, int]:
        """The fields of a request that is served by one of the DP ranks."""
        return {"routed_dp_rank": number % self._mode.dp_size} if self._mode.dp_size > 1 else {}

    def _event(self, restart: bool) -> Event:
        if restart:
            return self._random.choice((Event.STOP, Event.KILL))
        weights = _WEIGHTS | ({Event.MOVE: 5} if self._mode.dp_size > 1 else {})
        return self._random.choices(list(weights), list(weights.values()))[0]

    async def _happen(self, event: Event, session: Resumed, turn: Turn, before: Sequence[Turn]) -> None:
        if event is Event.KILL:
            self._stack.kill_engine()
            self._stack.start_engine(*self._stack.engine_arguments)
            return
        settle(self._stack, self._mode.dp_size)
        if event is Event.STOP:
            self._stack.stop_engine()
            self._stack.start_engine(*self._stack.engine_arguments)
            return
        self._stack.flush_device()
        if event in (Event.HOST, Event.DEVICE):
            for rank in controls(self._stack, self._mode.dp_size):
                rank.call("prefetch", 70, session=session.session.uid, tier=event.split()[0], timeout_ms=60_000)
        elif event is Event.CANCEL:
            self._break_off(session, turn)
        elif event is Event.CROWD and before:
            others = self._random.sample(before, min(3, len(before)))
            body = {
                "input_ids": [list(other.prompt) for other in others],
                "sampling_params": {"max_new_tokens": 2, "temperature": 0, "ignore_eos": True},
                "cache_salt": self._salt,
            }
            httpx.post(f"{self._stack.engine_url}/generate", json=body, timeout=600).raise_for_status()
            settle(self._stack, self._mode.dp_size)
            self._stack.flush_device()

    def _break_off(self, session: Resumed, turn: Turn) -> None:
        body = {
            "input_ids": [*turn.prompt, *self._tokens(150)],
            "sampling_params": {"max_new_tokens": 64, "temperature": 0, "ignore_eos": True},
            "stream": True,
            "session_id": session.engine_session,
            "cache_salt": self._salt,
        }
        try:
            httpx.post(
                f"{self._stack.engine_url}/generate", json=body, timeout=self._random.choice((0.02, 0.1, 0.4, 1.0))
            )
        except httpx.TimeoutException:
            return

    def _tokens(self, count: int) -> list[int]:
        return self._random.choices(self._mode.vocabulary, k=count)


def _difference(number: int, event: Event, turn: Turn, right: Answer, answer: Answer) -> dict[str, Any]:
    return {
        "turn": number,
        "event": str(event),
        "conversation": turn.conversation,
        "prompt_tokens": len(turn.prompt),
        "restored_tokens": answer.restored_tokens,
        "expected": list(right.tokens),
        "found": list(answer.tokens),
        "expected_steps": right.steps,
        "found_steps": answer.steps,
    }
