from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
import zmq
from zmq.utils.monitor import parse_monitor_message

from agentstate.errors import EngineError, EngineRefused, EngineUnreachable
from agentstate.fleet.control import ControlClient, new_secret, pack, protect, unpack
from engine_patch import control
from engine_patch.control import ControlEndpoint

WAIT_S = 60


class Rank:
    """What an endpoint asks: sessions by name, each with its state."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.asked = threading.Semaphore(0)
        self.ticks = threading.Semaphore(0)
        self.statistics: Any = {"rank": 0, "store": {"pages": 3}}

    def flush(self, session: str, durability: str) -> Callable[[], dict[str, Any]]:
        if durability == "shared":
            raise EngineError("this engine has no shared store")

        def answer() -> dict[str, Any]:
            self.asked.release()
            state = self.states[session]
            if state == "over its quota":
                raise EngineError("the account has its quota")
            if state == "broken":
                raise RuntimeError("the database is down")
            return {"state": state, "tokens": 64, "pages": 1, "bytes": 10}

        return answer

    def prefetch(
        self, session: str, tier: str, keys: bytes | None, due_s: float | None
    ) -> Callable[[], dict[str, Any]]:
        if tier == "moon":
            raise ValueError("tier 'moon' is neither host nor device")
        self.due_s = due_s
        return lambda: {"state": self.states[session], "tier": tier, "keys": keys}

    def demote(self, session: str) -> dict[str, Any]:
        if session not in self.states:
            raise EngineError("sessions cannot be demoted here")
        return {"state": "demoted"}

    def foresee(self, session: str, forecast: bytes | None, waited_s: float, kind: str) -> dict[str, Any]:
        self.foreseen = session, forecast, waited_s, kind
        return {"state": "accepted"}

    def explain(self, session: str) -> dict[str, Any]:
        return {"tiers": {}, "wait": None}

    def pin(self, session: str, tier: str, for_s: float) -> dict[str, Any]:
        return {"state": "accepted", "tier": tier, "for_s": for_s}

    def decisions(self, after: int) -> dict[str, Any]:
        return {"decisions": [], "more": False, "missed": False, "after": after}

    def release(self, session: str) -> dict[str, Any]:
        return {"state": "accepted" if session in self.states else "ignored"}

    def spill(self, on: bool) -> dict[str, Any]:
        return {"state": "on" if on else "off"}

    def tick(self) -> None:
        self.ticks.release()
        raise RuntimeError("from the test")

    def stat(self) -> dict[str, Any]:
        if isinstance(self.statistics, Exception):
            raise self.statistics
        found: dict[str, Any] = self.statistics
        return found


def serving(rank: Rank, address: str = "tcp://127.0.0.1:*") -> ControlEndpoint:
    endpoint = ControlEndpoint(address, rank)
    endpoint.serve()
    return endpoint


@pytest.fixture
def rank() -> Rank:
    return Rank()


@pytest.fixture
def endpoint(rank: Rank) -> Iterator[ControlEndpoint]:
    endpoint = serving(rank)
    yield endpoint
    endpoint.close()


@pytest.fixture
def client(endpoint: ControlEndpoint) -> ControlClient:
    return ControlClient(endpoint.address, endpoint.secret)


def raw_call(endpoint: ControlEndpoint, request: bytes) -> dict[str, Any]:
    socket = zmq.Context.instance().socket(zmq.REQ)
    socket.setsockopt(zmq.LINGER, 0)
    try:
        protect(socket, endpoint.secret, server=False)
        socket.connect(endpoint.address)
        socket.send(request)
        assert socket.poll(WAIT_S * 1000), "no answer"
        return unpack(socket.recv())
    finally:
        socket.close()


@pytest.mark.parametrize("state", ["durable", "partial", "lost", "unknown"])
def test_a_flush_of_a_settled_session_is_answered(rank: Rank, client: ControlClient, state: str) -> None:
    rank.states["s"] = state
    answer = client.call("flush", WAIT_S, session="s", timeout_ms=WAIT_S * 1000)
    assert answer == {"state": state, "tokens": 64, "pages": 1, "bytes": 10}


def test_a_flush_that_cannot_be_done_is_refused_at_once(rank: Rank, client: ControlClient) -> None:
    with pytest.raises(EngineRefused, match="no shared store"):
        client.call("flush", WAIT_S, session="s", durability="shared", timeout_ms=WAIT_S * 1000)


def test_a_flush_that_will_not_be_done_is_answered_while_it_waits(
    rank: Rank, client: ControlClient, caplog: pytest.LogCaptureFixture
) -> None:
    rank.states["s"] = "over its quota"
    with pytest.raises(EngineRefused, match="the account has its quota"):
        client.call("flush", WAIT_S, session="s", timeout_ms=WAIT_S * 1000)
    assert not caplog.records


def test_a_flush_waits_until_the_session_has_settled(rank: Rank, client: ControlClient) -> None:
    rank.states["s"] = "pending"
    answers: list[dict[str, Any]] = []
    caller = threading.Thread(
        target=lambda: answers.append(client.call("flush", WAIT_S, session="s", timeout_ms=WAIT_S * 1000))
    )
    caller.start()
    for _ in range(5):  # it is looked at again and again
        assert rank.asked.acquire(timeout=WAIT_S)
    assert answers == []
    rank.states["s"] = "durable"
    caller.join(WAIT_S)
    assert [answer["state"] for answer in answers] == ["durable"]


@pytest.mark.parametrize("timeout", [{"timeout_ms": 30}, {"timeout_ms": 0}, {}], ids=str)
def test_a_flush_whose_time_is_up_is_answered_as_pending(
    rank: Rank, client: ControlClient, timeout: dict[str, int]
) -> None:
    rank.states["s"] = "pending"
    assert client.call("flush", WAIT_S, session="s", **timeout)["state"] == "pending"


def test_a_waiting_flush_holds_nobody_up(rank: Rank, client: ControlClient) -> None:
    rank.states = {"slow": "pending", "quick": "durable"}
    answers: list[dict[str, Any]] = []
    caller = threading.Thread(
        target=lambda: answers.append(client.call("flush", WAIT_S, session="slow", timeout_ms=WAIT_S * 1000))
    )
    caller.start()
    assert rank.asked.acquire(timeout=WAIT_S)
    assert client.call("flush", WAIT_S, session="quick", timeout_ms=0)["state"] == "durable"
    assert client.call("stat", WAIT_S) == rank.statistics
    assert answers == []
    rank.states["slow"] = "lost"
    caller.join(WAIT_S)
    assert [answer["state"] for answer in answers] == ["lost"]


def test_a_caller_that_gave_up_does_no_harm(rank: Rank, client: ControlClient) -> None:
    rank.states["s"] = "pending"
    with pytest.raises(EngineUnreachable):
        client.call("flush", 0.05, session="s", timeout_ms=WAIT_S * 1000)
    rank.states["s"] = "durable"
    assert client.call("flush", WAIT_S, session="s", timeout_ms=0)["state"] == "durable"


def test_a_session_that_cannot_be_looked_up_is_refused_with_the_reason(rank: Rank, client: ControlClient) -> None:
    rank.states["s"] = "broken"
    with pytest.raises(EngineRefused, match="the database is down"):
        client.call("flush", WAIT_S, session="s", timeout_ms=WAIT_S * 1000)
    assert client.call("stat", WAIT_S) == rank.statistics


def test_statistics_that_fail_are_refused_with_the_reason(rank: Rank, client: ControlClient) -> None:
    good = rank.statistics
    rank.statistics = RuntimeError("no statistics today")
    with pytest.raises(EngineRefused, match="no statistics today"):
        client.call("stat", WAIT_S)
    rank.statistics = good
    assert client.call("stat", WAIT_S) == good


@pytest.mark.parametrize("verb", ["fetch", "", "FLUSH"])
def test_an_unknown_verb_is_refused_by_name(client: ControlClient, verb: str) -> None:
    with pytest.raises(EngineRefused, match=f"unknown verb '{verb}'"):
        client.call(verb, WAIT_S)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1\xc1",
        msgpack.packb([1, 2]),
        msgpack.packb({1: 2}),
        pack({"verb": "stat"})[:-1],
        pack({"verb": "flush"}),
        pack({"verb": "flush", "session": "s", "timeout_ms": "soon"}),
        pack({"verb": "flush", "session": "s", "timeout_ms": None}),
        pack({"verb": ["stat"]}),
        pack({}),
    ],
    ids=["nothing", "no msgpack", "list", "int key", "cut", "no session", "text", "no time", "list verb", "no verb"],
)
def test_malformed_requests_are_refused_and_the_endpoint_goes_on(
    rank: Rank, endpoint: ControlEndpoint, raw: bytes
) -> None:
    rank.states["s"] = "durable"
    answer = raw_call(endpoint, raw)
    assert answer["ok"] is False
    assert answer["error"]
    assert ControlClient(endpoint.address, endpoint.secret).call("stat", WAIT_S) == rank.statistics


def test_a_message_without_an_envelope_is_answered_too(rank: Rank, endpoint: ControlEndpoint) -> None:
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    protect(dealer, endpoint.secret, server=False)
    dealer.connect(endpoint.address)
    dealer.send(pack({"verb": "stat"}))
    assert dealer.poll(WAIT_S * 1000)
    assert unpack(dealer.recv()) == {"ok": True, **rank.statistics}
    dealer.close()


def test_an_address_that_is_taken_or_none_is_named(rank: Rank, endpoint: ControlEndpoint) -> None:
    for address in (endpoint.address, "nonsense"):
        with pytest.raises(EngineError, match=f"{address} cannot be bound.*AGENTSTATE_CONTROL_ADDRESS"):
            serving(rank, address)


def test_closing_frees_the_address_also_while_somebody_waits(rank: Rank) -> None:
    rank.states["s"] = "pending"
    endpoint = serving(rank)
    client = ControlClient(endpoint.address, endpoint.secret)
    errors: list[EngineError] = []

    def call() -> None:
        try:
            client.call("flush", 5, session="s", timeout_ms=WAIT_S * 1000)
        except EngineUnreachable as error:
            errors.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    assert rank.asked.acquire(timeout=WAIT_S)
    endpoint.close()
    caller.join(WAIT_S)
    assert len(errors) == 1
    again = serving(rank, endpoint.address)
    assert ControlClient(again.address, again.secret).call("stat", WAIT_S) == rank.statistics
    again.close()


def test_a_prefetch_is_waited_for_while_it_runs(rank: Rank, client: ControlClient) -> None:
    rank.states["s"] = "pending"
    answer = client.call("prefetch", WAIT_S, session="s", tier="host", keys=b"k" * 64)
    assert answer == {"state": "pending", "tier": "host", "keys": b"k" * 64}
    threading.Timer(0.05, rank.states.__setitem__, ("s", "warm")).start()
    answer = client.call("prefetch", WAIT_S, session="s", tier="device", timeout_ms=60_000)
    assert answer == {"state": "warm", "tier": "device", "keys": None}
    with pytest.raises(EngineRefused, match="moon"):
        client.call("prefetch", WAIT_S, session="s", tier="moon")


def test_a_session_is_demoted(rank: Rank, client: ControlClient) -> None:
    rank.states["s"] = "durable"
    assert client.call("demote", WAIT_S, session="s") == {"state": "demoted"}
    with pytest.raises(EngineRefused, match="cannot be demoted here"):
        client.call("demote", WAIT_S, session="t")


@pytest.mark.parametrize(("told", "due_s"), [({}, None), ({"due_ms": 1500}, 1.5), ({"due_ms": 0}, 0.0)], ids=str)
def test_a_prefetch_says_when_its_pages_are_needed(
    rank: Rank, client: ControlClient, told: dict[str, int], due_s: float | None
) -> None:
    rank.states["s"] = "warm"
    client.call("prefetch", WAIT_S, session="s", tier="host", **told)
    assert rank.due_s == due_s


@pytest.mark.parametrize("due_ms", [-1, float("inf"), float("nan"), "soon", True], ids=str)
def test_a_prefetch_is_due_at_no_such_time(rank: Rank, client: ControlClient, due_ms: Any) -> None:
    rank.states["s"] = "warm"
    with pytest.raises(EngineRefused, match="malformed request: .*no number of milliseconds"):
        client.call("prefetch", WAIT_S, session="s", tier="host", due_ms=due_ms)


@pytest.mark.parametrize("forecast", [b"\x01\xff", None])
def test_a_forecast_is_taken_note_of(rank: Rank, client: ControlClient, forecast: bytes | None) -> None:
    told = {"session": "s", "forecast": forecast, "waited_ms": 250, "kind": "tool"}
    assert client.call("foresee", WAIT_S, **told) == {"state": "accepted"}
    assert rank.foreseen == ("s", forecast, 0.25, "tool")


@pytest.mark.parametrize(
    "wrong",
    [{"forecast": "soon"}, {"waited_ms": -1}, {"waited_ms": float("inf")}, {"waited_ms": None}, {"kind": "lunch"}],
    ids=str,
)
def test_a_forecast_that_is_none_is_refused(rank: Rank, client: ControlClient, wrong: dict[str, Any]) -> None:
    told = {"session": "s", "forecast": None, "waited_ms": 0, "kind": "tool"}
    with pytest.raises(EngineRefused, match="malformed request"):
        client.call("foresee", WAIT_S, **{**told, **wrong})
    assert not hasattr(rank, "foreseen")


def test_a_session_is_released(rank: Rank, client: ControlClient) -> None:
    rank.states["s"] = "durable"
    assert client.call("release", WAIT_S, session="s") == {"state": "accepted"}
    assert client.call("release", WAIT_S, session="t") == {"state": "ignored"}


def test_a_tick_that_fails_is_not_the_last(rank: Rank, client: ControlClient) -> None:
    assert rank.ticks.acquire(timeout=WAIT_S) and rank.ticks.acquire(timeout=WAIT_S)
    assert client.call("stat", WAIT_S)


def test_spilling_is_turned_off_and_on(client: ControlClient) -> None:
    assert client.call("spill", WAIT_S, on=False)["state"] == "off"
    assert client.call("spill", WAIT_S, on=True)["state"] == "on"
    with pytest.raises(EngineRefused, match="malformed"):
        client.call("spill", WAIT_S)


def test_a_pin_says_for_how_long(client: ControlClient) -> None:
    assert client.call("pin", WAIT_S, session="s", tier="nvme", ttl_ms=1500)["for_s"] == 1.5
    for wrong in ({}, {"ttl_ms": -1}, {"ttl_ms": "1"}, {"ttl_ms": float("nan")}):
        with pytest.raises(EngineRefused, match="malformed"):
            client.call("pin", WAIT_S, session="s", tier="nvme", **wrong)


def test_decisions_are_asked_for_after_an_id(client: ControlClient) -> None:
    assert client.call("decisions", WAIT_S, after=2**53)["after"] == 2**53
    for wrong in ({}, {"after": "yesterday"}):
        with pytest.raises(EngineRefused, match="malformed"):
            client.call("decisions", WAIT_S, **wrong)


VERBS: dict[str, dict[str, Any]] = {
    "flush": {"session": "s"},
    "prefetch": {"session": "s", "tier": "host"},
    "demote": {"session": "s"},
    "foresee": {"session": "s", "forecast": None, "waited_ms": 0, "kind": "other"},
    "pin": {"session": "s", "tier": "host", "ttl_ms": 0},
    "release": {"session": "s"},
    "explain": {"session": "s"},
    "decisions": {"after": 0},
    "spill": {"on": False},
    "stat": {},
}


@pytest.mark.parametrize("secret", [None, new_secret()], ids=["none", "another"])
@pytest.mark.parametrize("verb", VERBS)
def test_who_does_not_know_the_secret_gets_no_answer(
    rank: Rank, endpoint: ControlEndpoint, secret: str | None, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(rank, verb, lambda *given: asked.append(given))
    with pytest.raises(EngineUnreachable, match=f"did not answer '{verb}'"):
        ControlClient(endpoint.address, secret).call(verb, 0.3, **VERBS[verb])
    monkeypatch.undo()
    # It was not asked either, and answers who does.
    assert ControlClient(endpoint.address, endpoint.secret).call("stat", WAIT_S) == rank.statistics
    assert asked == []


def test_these_are_all_verbs() -> None:
    assert VERBS.keys() == {name for name in vars(control.Verbs) if not name.startswith("_")} - {"tick"}


def test_an_endpoints_public_key_opens_nothing(endpoint: ControlEndpoint) -> None:
    with zmq.Context.instance().socket(zmq.REQ) as socket:
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        socket.curve_serverkey = zmq.curve_public(endpoint.secret.encode())
        with socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH) as monitor:
            socket.connect(endpoint.address)
            told = parse_monitor_message(monitor.recv_multipart())
            socket.disable_monitor()
        socket.close(linger=0)
    assert told["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH


def test_every_endpoint_has_a_secret_of_its_own(endpoint: ControlEndpoint) -> None:
    other = serving(Rank())
    assert other.secret != endpoint.secret
    other.close()


def test_so_many_peers_may_wait(
    rank: Rank, endpoint: ControlEndpoint, client: ControlClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_MOST_WAITERS", 3)
    rank.states["s"] = "pending"
    answers: list[dict[str, Any]] = []

    def wait() -> None:
        answers.append(client.call("flush", WAIT_S, session="s", timeout_ms=WAIT_S * 1000))

    peers = [threading.Thread(target=wait) for _ in range(3)]
    for peer in peers:
        peer.start()
    while endpoint.waiting < 3:
        assert rank.asked.acquire(timeout=WAIT_S)
    for verb in ("flush", "prefetch"):
        with pytest.raises(EngineRefused, match="3 peers wait for answers already"):
            client.call(verb, WAIT_S, session="s", tier="host", timeout_ms=1)
    # What waits for nobody is answered, and who waits goes on.
    assert client.call("stat", WAIT_S) == rank.statistics
    rank.states["s"] = "durable"
    for peer in peers:
        peer.join(WAIT_S)
    assert [answer["state"] for answer in answers] == ["durable"] * 3


@pytest.mark.parametrize("timeout_ms", [float("inf"), float("nan"), 1e300, -1])
def test_nobody_waits_for_ever(
    rank: Rank, client: ControlClient, timeout_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_LONGEST_WAIT_S", 0.05)
    rank.states["s"] = "pending"
    assert client.call("flush", WAIT_S, session="s", timeout_ms=timeout_ms)["state"] == "pending"
