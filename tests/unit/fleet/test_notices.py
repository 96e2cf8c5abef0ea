"""What engines are told and nobody waits for: the newest, in turns, within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from agentstate.errors import EngineRefused, EngineUnreachable
from agentstate.fleet import notices
from agentstate.fleet.engines import Engine
from agentstate.fleet.notices import Notice, Notices


def rank(name: str = "eng_1") -> Engine:
    return Engine(name, "n1", 0, f"tcp://{name}", "http://127.0.0.1:30000/v1", "m", "f1", "/pages", control_secret="s")


class Engines:
    """Answers what it is told once it may."""

    def __init__(self, answer: Callable[[str, str], Any] = lambda address, verb: {"state": "accepted"}):
        self.heard: list[tuple[str, str, Any]] = []
        self.may_answer = asyncio.Event()
        self.answer = answer

    async def __call__(
        self, address: str, secret: str | None, verb: str, timeout_s: float, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        assert secret == "s"
        self.heard.append((address, verb, arguments))
        await self.may_answer.wait()
        found = self.answer(address, verb)
        if isinstance(found, Exception):
            raise found
        return dict(found)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        await asyncio.wait_for(work(), 60)

    asyncio.run(within())


async def all_told(told: Notices) -> None:
    while told.waiting:
        await asyncio.sleep(0)


def note(value: Any, engine: str = "eng_1", verb: str = "foresee") -> Notice:
    return Notice(rank(engine), verb, lambda: {"value": value})


def test_the_newest_of_a_session_is_told() -> None:
    async def work() -> None:
        engines = Engines()
        told = Notices(engines)
        for number in range(notices.SENDERS):
            told.add("t", f"sending {number}", note(number))
        await asyncio.sleep(0)
        for number in range(5):
            told.add("t", "s", note(number))
        told.add("t", "gone", note("gone"))
        told.remove("gone")
        told.remove("never there")
        engines.may_answer.set()
        await all_told(told)
        assert [one["value"] for _, _, one in engines.heard[notices.SENDERS :]] == [4]
        assert told.told == {"accepted": notices.SENDERS + 1}

    run(work)


def test_a_flood_of_one_tenant_delays_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "SENDERS", 1)
    monkeypatch.setattr(notices, "MAX_OF_TENANT", 10)

    async def work() -> None:
        engines = Engines()
        told = Notices(engines)
        for number in range(50):
            told.add("loud", f"loud {number}", note(number))
        told.add("quiet", "q1", note("q1"))
        told.add("quiet", "q2", note("q2"))
        engines.may_answer.set()
        await all_told(told)
        order = [one["value"] for _, _, one in engines.heard]
        assert order.index("q1") <= 2 and order.index("q2") <= 4
        # Of the loud one's the newest are left.
        assert [value for value in order if isinstance(value, int)] == list(range(40, 50))
        assert told.told == {"accepted": 12, "dropped": 40}

    run(work)


def test_a_verb_that_an_engine_does_not_know_is_not_said_again() -> None:
    def answer(address: str, verb: str) -> Any:
        old = address == "tcp://old" and verb == "foresee"
        return EngineRefused("the engine refused: unknown verb 'foresee'") if old else {"state": "ignored"}

    async def work() -> None:
        engines = Engines(answer)
        engines.may_answer.set()
        told = Notices(engines)
        for number in range(3):
            for engine in ("old", "new"):
                told.add("t", f"{engine} {number}", note(number, engine))
                await all_told(told)
        told.add("t", "s", note(0, "old", "release"))
        await all_told(told)
        assert [(address, verb) for address, verb, _ in engines.heard] == [
            ("tcp://old", "foresee"),
            *[("tcp://new", "foresee")] * 3,
            ("tcp://old", "release"),
        ]
        assert told.told == {"unknown": 3, "ignored": 4}

    run(work)


def test_an_engine_that_is_silent_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        engines = Engines(lambda address, verb: EngineUnreachable("no answer") if address == "tcp://dead" else {})
        engines.may_answer.set()
        told = Notices(engines)

        async def tell(session: str, engine: str) -> None:
            told.add("t", session, note(session, engine))
            await all_told(told)

        await tell("a", "dead")
        await tell("b", "dead")
        await tell("c", "alive")
        monkeypatch.setattr(notices, "QUIET_S", 0.0)
        told._quiet("dead", "", 0.0)
        await tell("d", "dead")
        assert [one["value"] for _, _, one in engines.heard] == ["a", "c", "d"]
        assert told.told == {"unreachable": 3, "None": 1}

    run(work)


def test_what_goes_wrong_with_one_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        engines = Engines(lambda address, verb: EngineRefused("malformed") if address == "tcp://odd" else {})
        engines.may_answer.set()
        told = Notices(engines)

        def broken() -> dict[str, Any]:
            raise RuntimeError("from the test")

        told.add("t", "a", Notice(rank(), "foresee", broken))
        told.add("t", "b", note("b", "odd"))
        told.add("t", "c", note("c"))
        await all_told(told)
        assert told.told == {"refused": 1, "None": 1}

    run(work)
    assert "from the test" in caplog.text


def test_nothing_is_told_once_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "SENDERS", 1)

    async def work() -> None:
        engines = Engines()
        told = Notices(engines)
        for session in "abc":
            told.add("t", session, note(session))
        await asyncio.sleep(0)
        told.close()
        told.add("t", "d", note("d"))
        engines.may_answer.set()
        await all_told(told)
        assert [one["value"] for _, _, one in engines.heard] == ["a"]

    run(work)
