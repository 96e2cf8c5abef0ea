"""What the engines of a simulation know of sessions that wait, and what that makes their pages worth."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

from agentstate.benchmarks.clock import Clock
from agentstate.benchmarks.fleet import Foresight, Outcome, Policy
from agentstate.benchmarks.traces import ROOT, Gap, Turn, Workload
from agentstate.lookahead.durations import OTHER, PERSON, Durations
from agentstate.lookahead.forecast import Forecast
from agentstate.lookahead.policies import Policy as Ordering
from agentstate.lookahead.policies import Wait

_LEARNING = (Foresight.LEARNED, Foresight.ANNOUNCED, Foresight.TOOLS)
_NEVER = Forecast.exactly(math.inf)
NEEDED = 1e9  # what runs or is queued
SHARED = 1e6


@dataclass(slots=True)
class Conversation:
    """A path that one session alone goes on. ``back_s`` is when it comes back, infinite if it does not."""

    number: int
    session: int
    busy: bool = False
    used_s: float = 0.0
    forecast: Forecast | None = None
    since_s: float = 0.0  # what is forecast counts from then
    back_s: float = math.inf
    tool: str = OTHER
    head: str = ""
    announced_s: float | None = None
    waits: bool = False


class Waits:
    def __init__(self, workload: Workload, clock: Clock, policy: Policy, outcome: Outcome, seed: int):
        assert policy.ordering is not None
        self._clock, self._policy, self._outcome = clock, policy, outcome
        self._ordering: Ordering = policy.ordering
        self._announced = workload.announced
        self._durations = Durations()
        self.conversations: list[Conversation] = []
        self._of = [-1] * len(workload.parents)
        self._shared = [False] * len(workload.parents)
        self._current: dict[int, Conversation] = {}
        for session, turns in enumerate(workload.sessions):
            before = ROOT
            for turn in turns:
                self._own(workload, session, turn, before)
                before = turn.answer
        # Drawn beforehand, so that each policy is told the same.
        source = random.Random(seed + 1)
        self._errors = [[source.gauss(0, 1) for _ in turns] for turns in workload.sessions]

    def _own(self, workload: Workload, session: int, turn: Turn, before: int) -> None:
        path, segment = [turn.answer], turn.prompt
        while segment != ROOT and self._of[segment] < 0:
            path.append(segment)
            segment = workload.parents[segment]
        if segment != ROOT and segment == before:
            number = self._of[segment]
        else:
            number = len(self.conversations)
            self.conversations.append(Conversation(number, session))
            while segment != ROOT and not self._shared[segment]:
                self._shared[segment] = True
                segment = workload.parents[segment]
        for own in path:
            self._of[own] = number

    def value(self, segment: int) -> float:
        """What a byte of a segment is worth."""
        if self._shared[segment]:
            return SHARED
        conversation = self.conversations[self._of[segment]]
        if conversation.busy:
            return NEEDED
        return self.worth(conversation)

    def worth(self, conversation: Conversation) -> float:
        now_s = self._clock.now_s
        if self._is_exact(conversation):
            return 1 / max(1e-3, conversation.back_s - now_s)
        if conversation.forecast is None:
            return self._ordering(Wait(None, now_s - conversation.used_s, 1.0, 1))
        return self._ordering(Wait(conversation.forecast, now_s - conversation.since_s, 1.0, 1))

    def _is_exact(self, conversation: Conversation) -> bool:
        if self._policy.foresight is Foresight.TOOLS:
            return conversation.tool not in (PERSON, OTHER)
        return self._policy.foresight is Foresight.EXACT

    def ranked(self, sessions: Iterable[int]) -> list[tuple[float, int]]:
        """Those of the sessions that wait and may come back, each with what it is worth, the most valuable first."""
        found = []
        for session in sessions:
            conversation = self._current[session]
            if conversation.waits and (
                conversation.forecast is not None or (self._is_exact(conversation) and conversation.back_s < math.inf)
            ):
                found.append((self.worth(conversation), session))
        return sorted(found, reverse=True)

    def is_waiting(self, session: int) -> bool:
        return self._current[session].waits

    def came(self, session: int, turn: Turn) -> None:
        """A session's request has arrived."""
        now_s = self._clock.now_s
        conversation = self.conversations[self._of[turn.answer]]
        before = self._current.get(session)
        if before is not None and before.waits:
            took_s = now_s - before.used_s if before is conversation or not turn.fresh else None
            if before.forecast is not None and took_s is not None and before.since_s == before.used_s:
                self._outcome.forecasts += 1
                low, high = (before.forecast.rest(0.0, share) for share in (0.1, 0.9))
                self._outcome.within += low <= took_s <= high
            if self._policy.foresight in _LEARNING:
                self._durations.observe(before.tool, before.head, took_s, before.announced_s)
            before.waits = False
            if before is not conversation and not turn.fresh and self._policy.foresight is not Foresight.NOT:
                before.forecast = _NEVER  # the session goes on with another prefix
        conversation.busy = True
        self._current[session] = conversation

    def left(self, session: int, number: int, turn: Turn, back_s: float) -> None:
        """A session's turn has ended, and ``turn``, which is its next, will come at ``back_s``."""
        now_s = self._clock.now_s
        conversation = self._current[session]
        conversation.busy, conversation.waits = False, True
        conversation.used_s = conversation.since_s = now_s
        goes_on = self._of[turn.answer] == conversation.number
        conversation.back_s = back_s if goes_on else math.inf
        conversation.announced_s = None
        if turn.gap is Gap.TOOL:
            conversation.tool, conversation.head = turn.tool or "tool", turn.head
            if self._policy.foresight is Foresight.ANNOUNCED:
                conversation.announced_s = self._announced.say(back_s - now_s, self._errors[session][number])
        elif turn.gap is Gap.OTHER:
            conversation.tool, conversation.head = OTHER, ""
        else:
            conversation.tool, conversation.head = PERSON, ""
        if self._policy.foresight in _LEARNING:
            conversation.forecast = self._durations.forecast(
                conversation.tool, conversation.head, conversation.announced_s
            )

    def over(self, session: int) -> None:
        """A session has ended."""
        conversation = self._current.pop(session)
        conversation.busy = False
        conversation.used_s = conversation.since_s = self._clock.now_s
        conversation.back_s = math.inf

    def expected(self, session: int, in_s: float) -> None:
        """It is said that a session comes back in so many seconds."""
        conversation = self._current[session]
        conversation.forecast = Forecast.exactly(in_s)
        conversation.since_s = self._clock.now_s
