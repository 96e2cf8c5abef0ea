from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import msgpack
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from agentstate.errors import EngineError, EngineRefused, EngineUnreachable
from agentstate.fleet.control import ControlClient, ControlConnections, pack, unpack

T = TypeVar("T")
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@contextmanager
def engine_of_peers(answer: Callable[[bytes, bytes], bytes | None]) -> Iterator[str]:
    """An endpoint that answers requests with ``answer``, or not at all where that is None. It is given the request and
    the connection's name."""
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            if socket.poll(20):
                *peer, request = socket.recv_multipart()
                reply = answer(request, peer[0])
                if reply is not None:
                    socket.send_multipart([*peer, reply])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        ended.set()
        thread.join()
        socket.close()


def engine(answer: Callable[[bytes], bytes | None]) -> AbstractContextManager[str]:
    return engine_of_peers(lambda request, peer: answer(request))


@given(st.dictionaries(st.text(), plain, max_size=4))
def test_a_message_comes_back_as_it_was_packed(message: dict[str, object]) -> None:
    assert unpack(pack(message)) == message


@given(st.binary(max_size=64))
def test_any_bytes_are_a_map_or_a_value_error(raw: bytes) -> None:
    try:
        message = unpack(raw)
    except ValueError as error:
        assert str(error).startswith("not a control message: ")
    else:
        assert isinstance(message, dict)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        msgpack.packb([1, 2]),
        msgpack.packb("flush"),
        msgpack.packb({1: 2}),
        msgpack.packb({"verb": "stat"})[:-1],
        msgpack.packb({"verb": "stat"}) + b"\0",
        msgpack.packb({"verb": b"\xff"}, use_bin_type=False),
        b"\x91" * 5000,
    ],
    ids=["nothing", "no msgpack", "list", "text", "int key", "cut", "more", "no UTF-8", "deep"],
)
def test_what_is_no_message_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="not a control message"):
        unpack(raw)


def test_keys_are_strings() -> None:
    with pytest.raises(ValueError, match="not a control message"):
        unpack(msgpack.packb({b"verb": "stat"}))


def test_a_call_sends_its_arguments_and_returns_the_fields_of_the_answer() -> None:
    seen: list[dict[str, object]] = []

    def answer(request: bytes) -> bytes:
        seen.append(unpack(request))
        return pack({"ok": True, "state": "durable", "tokens": 64})

    with engine(answer) as address:
        client = ControlClient(address)
        assert client.call("flush", 60, session="ses_1", timeout_ms=10) == {"state": "durable", "tokens": 64}
    assert seen == [{"verb": "flush", "session": "ses_1", "timeout_ms": 10}]


def test_a_refusal_carries_the_engines_reason() -> None:
    with (
        engine(lambda request: pack({"ok": False, "error": "unknown verb 'dance'"})) as address,
        pytest.raises(EngineRefused, match="refused 'dance': unknown verb 'dance'"),
    ):
        ControlClient(address).call("dance", 60)


@pytest.mark.parametrize("message", [{}, {"ok": False}, {"ok": None}, {"state": "durable"}], ids=str)
def test_an_answer_that_does_not_say_ok_is_a_refusal(message: dict[str, object]) -> None:
    with (
        engine(lambda request: pack(message)) as address,
        pytest.raises(EngineRefused, match="no reason given"),
    ):
        ControlClient(address).call("stat", 60)


@pytest.mark.parametrize("raw", [b"", b"\xc1", pack({"ok": True})[:-1]], ids=["nothing", "no msgpack", "cut"])
def test_an_answer_that_is_no_message_is_an_engine_error(raw: bytes) -> None:
    with engine(lambda request: raw) as address, pytest.raises(EngineError, match=address):
        ControlClient(address).call("stat", 60)


def test_a_silent_engine_is_unreachable_and_leaves_nothing_behind_for_the_next_call() -> None:
    def second_only(request: bytes) -> bytes | None:
        call = unpack(request)["call"]
        return pack({"ok": True, "call": call}) if call > 1 else None

    with engine(second_only) as address:
        client = ControlClient(address)
        with pytest.raises(EngineUnreachable, match=f"the engine at {address} did not answer 'stat' within 0.2 s"):
            client.call("stat", 0.2, call=1)
        assert client.call("stat", 60, call=2) == {"call": 2}


def test_an_address_where_nobody_listens_is_unreachable() -> None:
    with engine(lambda request: None) as address:
        pass
    with pytest.raises(EngineUnreachable, match=address):
        ControlClient(address).call("stat", 0.1)


@pytest.mark.parametrize("address", ["", "nonsense", "tcp://", "tcp://127.0.0.1", "gopher://127.0.0.1:1"])
def test_an_address_that_is_none_is_unreachable(address: str) -> None:
    with pytest.raises(EngineUnreachable, match="cannot be reached"):
        ControlClient(address).call("stat", 0.1)


def test_calls_of_many_threads_get_their_own_answers() -> None:
    with engine(lambda request: pack({"ok": True, "echo": unpack(request)["number"]})) as address:
        client = ControlClient(address)
        answers: dict[int, object] = {}
        threads = [
            threading.Thread(target=lambda n=n: answers.update({n: client.call("stat", 60, number=n)["echo"]}))
            for n in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {n: n for n in range(12)}


def on_a_loop(work: Callable[[ControlConnections], Coroutine[Any, Any, T]]) -> T:
    async def run() -> T:
        connections = ControlConnections()
        try:
            return await work(connections)
        finally:
            connections.close()

    return asyncio.run(run())


def test_exchanges_that_follow_one_another_share_a_connection() -> None:
    peers: list[bytes] = []

    def answer(request: bytes, peer: bytes) -> bytes:
        peers.append(peer)
        return pack({"ok": unpack(request)["verb"] != "dance", "call": len(peers)})

    async def calls(connections: ControlConnections) -> list[object]:
        first = await connections.call(address, None, "stat", 60)
        with pytest.raises(EngineRefused):
            await connections.call(address, None, "dance", 60)
        return [first["call"], (await connections.call(address, None, "stat", 60))["call"]]

    with engine_of_peers(answer) as address:
        assert on_a_loop(calls) == [1, 3]
    assert len(set(peers)) == 1


def test_exchanges_at_once_have_connections_of_their_own_and_get_their_own_answers() -> None:
    peers: set[bytes] = set()
    all_asked = threading.Event()

    def answer(request: bytes, peer: bytes) -> bytes:
        assert all_asked.wait(60)
        peers.add(peer)
        return pack({"ok": True, "echo": unpack(request)["number"]})

    async def calls(connections: ControlConnections) -> list[object]:
        asked = asyncio.gather(*(connections.call(address, None, "stat", 60, number=number) for number in range(12)))
        # After the first step of each.
        asyncio.get_running_loop().call_soon(all_asked.set)
        return [answer["echo"] for answer in await asked]

    with engine_of_peers(answer) as address:
        assert on_a_loop(calls) == list(range(12))
    assert len(peers) == 12


def test_a_connection_whose_answer_is_late_is_not_used_again() -> None:
    peers: dict[int, bytes] = {}

    def all_but_the_second(request: bytes, peer: bytes) -> bytes | None:
        call = unpack(request)["call"]
        peers[call] = peer
        return None if call == 2 else pack({"ok": True, "call": call})

    async def calls(connections: ControlConnections) -> object:
        await connections.call(address, None, "stat", 60, call=1)
        with pytest.raises(EngineUnreachable, match="did not answer 'stat' within 0.2 s"):
            await connections.call(address, None, "stat", 0.2, call=2)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(connections.call(unanswered, None, "stat", 60), 0.05)
        return (await connections.call(address, None, "stat", 60, call=3))["call"]

    with engine_of_peers(lambda request, peer: None) as unanswered, engine_of_peers(all_but_the_second) as address:
        assert on_a_loop(calls) == 3
    assert peers[1] == peers.get(2, peers[1]) != peers[3]  # it may have given up before the second one was sent


def test_idle_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentstate.fleet.control._IDLE_S", 0.01)
    peers: list[bytes] = []

    def answer(request: bytes, peer: bytes) -> bytes:
        peers.append(peer)
        return pack({"ok": True})

    async def calls(connections: ControlConnections) -> None:
        await connections.call(address, None, "stat", 60)
        await asyncio.sleep(0.1)
        assert connections.idle == 0
        await connections.call(address, None, "stat", 60)
        assert connections.idle == 1

    with engine_of_peers(answer) as address:
        on_a_loop(calls)
    assert len(set(peers)) == 2


def test_an_address_that_is_none_is_unreachable_on_a_loop_too() -> None:
    with pytest.raises(EngineUnreachable, match="cannot be reached"):
        on_a_loop(lambda connections: connections.call("nonsense", None, "stat", 0.1))
