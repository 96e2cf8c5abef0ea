from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from agentstate.api.gateway import dialects
from agentstate.api.gateway.chat import ChatStream
from agentstate.api.gateway.relay import Relay

EVENT = b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n'
END = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


class Engine:
    """An answer that comes in these chunks."""

    def __init__(self, *chunks: bytes):
        self._chunks = chunks

    async def chunks(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield chunk


class Client:
    """Gets what is sent; it takes no more once it has ``most`` chunks."""

    anthropic = False

    def __init__(self, log: list[str], most: int = 100):
        self._log = log
        self._most = most
        self.got: list[bytes] = []
        self.full = asyncio.Event()

    async def send(self, chunk: bytes, *, last: bool = False) -> None:
        self._log.append("sent")
        self.got.append(chunk)
        if len(self.got) == self._most:
            self.full.set()
            await asyncio.Event().wait()


class Heard(ChatStream):
    def __init__(self, log: list[str]):
        super().__init__()
        self._log = log

    def feed(self, data: bytes) -> None:
        self._log.append("heard")
        super().feed(data)


def relay(client: Client, *, store: bool = False, rewrites: bool = False) -> Any:
    made: Any = Relay.__new__(Relay)
    made.exchange, made.store, made.rewrites, made.dialect = client, store, rewrites, dialects.CHAT
    return made


def test_what_comes_is_on_its_way_to_the_client_before_it_is_read() -> None:
    async def run() -> None:
        log: list[str] = []
        client, recorder = Client(log), Heard(log)
        await relay(client).pass_stream(Engine(EVENT, EVENT + END), None, recorder)
        assert log == ["sent", "heard", "sent", "heard", "sent"]
        assert b"".join(client.got) == EVENT + EVENT + END
        assert recorder.end().whole

    asyncio.run(run())


def test_what_may_be_rewritten_is_read_before_it_is_sent() -> None:
    async def run() -> None:
        log: list[str] = []
        client, recorder = Client(log), Heard(log)
        await relay(client, rewrites=True).pass_stream(Engine(EVENT, END), None, recorder)
        assert log == ["heard", "sent", "heard", "sent", "sent"]

    asyncio.run(run())


def test_an_answer_is_heard_to_its_end_also_if_the_client_leaves_with_it() -> None:
    async def run() -> None:
        log: list[str] = []
        client, recorder = Client(log, most=2), Heard(log)
        passing = asyncio.ensure_future(relay(client).pass_stream(Engine(EVENT, END), None, recorder))
        await client.full.wait()
        passing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await passing
        assert recorder.done
        assert [said.item["content"] for said in recorder.end().messages] == ["a"]

    asyncio.run(run())
