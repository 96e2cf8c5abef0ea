"""A request on its way to an engine, and the answer on its way back."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool

from agentstate.api.gateway import documents, harnesses
from agentstate.api.gateway.dialects import Dialect
from agentstate.api.gateway.errors import Refusal, refusal, reshaped
from agentstate.api.gateway.exchange import JSON, LONG_BYTES, Exchange
from agentstate.api.gateway.heard import Call, Message
from agentstate.api.gateway.recording import Answer, Stream
from agentstate.api.gateway.turns import NOTHING, Kept, Turn
from agentstate.api.gateway.upstream import HOP_BY_HOP, Unreachable
from agentstate.api.gateway.upstream import Answer as Answered
from agentstate.errors import AgentStateError
from agentstate.fleet import hints
from agentstate.fleet.hints import Hints
from agentstate.fleet.placement import Server
from agentstate.sessions import toolcalls
from agentstate.sessions.belonging import Wanted
from agentstate.sessions.conversations import Conversation, Said
from agentstate.sessions.transcript import NewEntry
from agentstate.sql.models import EntryKind

if TYPE_CHECKING:
    from agentstate.api.gateway.app import Gateway

logger = logging.getLogger(__name__)

# The gateway's own, or the engine connection's: what a client sends of them is not passed on.
OWN_HEADERS = HOP_BY_HOP | {
    b"accept-encoding",
    b"authorization",
    b"content-encoding",
    b"content-length",
    b"cookie",
    b"expect",
    b"host",
    b"origin",
    b"x-api-key",
}
SSE_HEADERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
# The longest event: it is held until it is whole.
EVENT_BYTES = 64 << 20
# The beginning of an action's id, in the answer to its hint.
HINT_CHARACTERS = 64


class Passage:
    """A request of no session, whose answer is passed on."""

    def __init__(self, gateway: Gateway, exchange: Exchange, path: str):
        self.gateway = gateway
        self.exchange = exchange
        self.path = path
        self.raw = b""
        self.body: dict[str, Any] = {}
        self.request_id = ""

    async def run(self) -> None:
        exchange = self.exchange
        self.raw, self.body = await exchange.document(self.gateway.settings.gateway_body_bytes)
        self.take_out()
        await exchange.while_there(self.work())

    async def work(self) -> None:
        server, *_ = await self.gateway.fleet.serving(self.model)
        turn = await self.gateway.turns.without(self.exchange.tenant)
        with self.gateway.fleet.counted(server.base_url):
            headers = [*self.passed_on(), *turn.handover(_request_id("req-")).headers()]
            async with self.gateway.upstream.ask(server.base_url, self.path, self.raw, headers) as answer:
                if answer.status == 200:
                    await self.pass_through(answer, self.told(turn))
                else:
                    await self.pass_whole(answer, self.told(turn))

    def take_out(self) -> None:
        """Take out of the body what no engine is to get."""
        changed = harnesses.sanitize(self.body)
        if self.gateway.settings.gateway_strip and harnesses.strip_volatile(self.body):
            changed = True
        if changed:
            self.raw = self.dumped(self.body)

    def dumped(self, body: dict[str, Any]) -> bytes:
        """A body as it is sent. Raises Refusal: what can be read may be too deep to be written."""
        try:
            return documents.dumps(body)
        except ValueError as error:
            raise Refusal(400, "invalid_json", f"the body cannot be sent on: {error}") from None

    @property
    def model(self) -> str | None:
        model = self.body.get("model")
        if model is not None and not isinstance(model, str):
            raise Refusal(400, "invalid_model", "the model is not a string", "model")
        return model or None

    async def pass_through(self, answer: Answered, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Pass on an answer as it comes: one that nobody has to read here may be of any length."""
        length = [(b"content-length", answer.length.encode())] if answer.length else []
        await self.exchange.start(200, [(b"content-type", answer.content_type.encode("latin-1")), *length, *headers])
        async for chunk in answer.chunks():
            await self.exchange.send(chunk)
        await self.exchange.send(b"", last=True)

    async def pass_whole(self, answer: Answered, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Pass on an answer in one piece; an error in the form that the client reads."""
        body = await answer.body()
        if answer.status in (401, 403):
            # A client would take it for a word about its own key.
            logger.error("an engine answers %d: is AGENTSTATE_ENGINE_API_KEY the engines' --api-key?", answer.status)
            raise Refusal(502, "engine_refused", "the engine does not take requests of this gateway")
        content_type = (b"content-type", answer.content_type.encode("latin-1"))
        retry = [(b"retry-after", answer.retry_after.encode("latin-1"))] if answer.retry_after else []
        if answer.status >= 400:
            body, content_type = reshaped(answer.status, body, self.exchange.anthropic), JSON
            again = answer.status in (408, 429) or answer.status >= 500
            retry.append((b"x-should-retry", b"true" if again else b"false"))
        await self.exchange.answer(answer.status, body, [content_type, *retry, *headers])

    def passed_on(self) -> Iterator[tuple[bytes, bytes]]:
        """The client's headers that the engine gets."""
        for name, value in self.exchange.headers.items():
            own = name in OWN_HEADERS or name.startswith(b"x-agentstate-")
            if not own and not harnesses.RESERVED.header(name):
                yield name, value

    def told(self, turn: Turn) -> list[tuple[bytes, bytes]]:
        """What the client learns of its session."""
        headers = []
        if turn.session is not None:
            headers.append((b"x-agentstate-session", _header(turn.session)))
        if (kv := turn.kv) is not None:
            headers.append((b"x-agentstate-kv", f"{kv.state}; tokens={kv.tokens}".encode()))
        if turn.degraded:
            headers.append((b"x-agentstate-degraded", b"database"))
        return headers


class Relay(Passage):
    """A request of a conversation: it is a turn of a session. ``rewrites`` says whether events are `passed` otherwise
    than they came, which takes having heard them."""

    rewrites = False

    def __init__(self, gateway: Gateway, exchange: Exchange, path: str, dialect: Dialect):
        super().__init__(gateway, exchange, path)
        self.dialect = dialect
        self.metrics = gateway.service.metrics
        self.messages: list[Message] = []
        self.hints = Hints()
        self.store = False
        self.begin_s = 0.0

    async def run(self) -> None:
        exchange = self.exchange
        settings = self.gateway.settings
        self.raw, self.body = await exchange.document(settings.gateway_body_bytes)
        try:
            self.identity = harnesses.identify(exchange.headers, self.body)
        except ValueError as error:
            raise Refusal(400, "invalid_request", str(error), "session_id") from None
        try:
            self.hints = hints.read(self.body.get("kv_hints"), settings.pin_max_s)
        except ValueError as error:
            raise Refusal(400, "invalid_request", str(error), "kv_hints") from None
        self.take_out()
        self.check()
        referred = await self.complete()
        if referred or len(self.raw) > LONG_BYTES:
            # It takes longer than the next chunks of other streams may wait.
            self.messages = await run_in_threadpool(self.heard, self.body)
        else:
            self.messages = self.heard(self.body)
        self.store = self.is_stored()
        self.request_id = _request_id(self.dialect.id_prefix)
        await exchange.while_there(self.work())

    def check(self) -> None:
        """Raises Refusal for a request that says what it may not."""

    async def complete(self) -> bool:
        """Put into the body what it only refers to; whether there was anything. Raises Refusal."""
        return False

    def heard(self, body: dict[str, Any]) -> list[Message]:
        """The messages of a request. Raises Refusal."""
        try:
            return self.dialect.messages(body)
        except ValueError as error:
            raise Refusal(400, "invalid_request", str(error)) from None

    def is_stored(self) -> bool:
        """Whether the transcript is kept."""
        store = self.body.get("store")
        return store if isinstance(store, bool) else self.gateway.settings.gateway_store

    async def work(self) -> None:
        gateway = self.gateway
        prefix = self.body.get("prompt_cache_key")
        servers = await gateway.fleet.serving(self.model, prefix if isinstance(prefix, str) else None)
        asked_s = time.perf_counter()
        turn = await self.begin(self.wanted(servers[0]))
        self.begin_s = time.perf_counter() - asked_s
        self.metrics.gateway_begin_seconds.observe(self.begin_s)
        came = "degraded" if turn.degraded else turn.begun.origin
        self.metrics.gateway_requests.labels(self.dialect.name, came).inc()
        if not turn.expects(self.hints):
            self.hints = self.hints.ignored()
        try:
            await self.prepare(turn)
            urls = [server.base_url for server in servers]
            nearest = turn.base_url if turn.base_url in urls else urls[0]
            await self.ask_first([nearest, *(url for url in urls if url != nearest)], turn)
        finally:
            turn.end_later()

    async def ask_first(self, base_urls: Sequence[str], turn: Turn) -> None:
        """Ask the first engine that can be connected to: no other has seen the request then."""
        headers = [*self.passed_on(), *turn.handover(self.request_id).headers()]
        for number, base_url in enumerate(base_urls, 1):
            try:
                with self.gateway.fleet.counted(base_url), self.ending(base_url):
                    async with self.gateway.upstream.ask(base_url, self.path, self.raw, headers) as answer:
                        if answer.status == 200 and answer.streams:
                            await self.stream(answer, turn)
                        else:
                            await self.whole(answer, turn)
                    return
            except Unreachable as unreachable:
                if number == len(base_urls):
                    raise
                logger.warning("%s: another one is asked", unreachable.message)

    async def begin(self, wanted: Wanted) -> Turn:
        return await self.gateway.turns.begin(self.exchange.tenant, wanted, self.gateway.settings.gateway_wait_s)

    async def prepare(self, turn: Turn) -> None:
        """What the request needs of its turn before it is sent."""

    def told(self, turn: Turn) -> list[tuple[bytes, bytes]]:
        headers = [*super().told(turn), (b"server-timing", f"begin;dur={self.begin_s * 1000:.3f}".encode())]
        if answers := self.hints.answers:
            named = {quote(action[:HINT_CHARACTERS], safe=""): answer for action, answer in answers.items()}
            told = ", ".join(f"{action}={answer}" for action, answer in named.items())
            headers.append((b"x-agentstate-kv-hints", told.encode()))
        return headers

    def wanted(self, server: Server) -> Wanted:
        identity, guesses = self.identity, self.gateway.settings.gateway_guess
        conversation = self.conversation() if self.messages else None
        harness = identity.harness if guesses and identity.kind == "turn" else None
        told = identity.session is not None or harness is not None
        return Wanted(
            # What it says after with one adapter is not what another one has said.
            model=self.model or server.model,
            session=identity.session,
            harness=harness,
            conversation=conversation if told or (guesses and identity.harness is None) else None,
            results=[_result(message, self.store) for message in self.messages if message.result_of],
            engine=server.base_url,
            metadata={} if identity.harness is None else {"harness": identity.harness},
        )

    def conversation(self, answer: Iterable[Message] = ()) -> Conversation:
        return Conversation([Said(said.role, said.digest, said.size) for said in (*self.messages, *answer)])

    async def stream(self, answered: Answered, turn: Turn) -> None:
        recorder = self.dialect.stream()
        content_type = (b"content-type", answered.content_type.encode("latin-1"))
        await self.exchange.start(200, [content_type, *SSE_HEADERS, *self.told(turn)])
        try:
            await self.pass_stream(answered, turn, recorder)
        finally:
            # A client may leave as soon as it has seen the end.
            if recorder.done and not self.store:
                turn.end_later(self.kept(turn, recorder.end()))

    async def pass_stream(self, answered: Answered, turn: Turn, recorder: Stream) -> None:
        """Pass a stream on as its events come. Where the transcript is kept, the end is held back until that is."""
        held = bytearray()
        begun, heard_first = False, self.store or self.rewrites
        broken: Refusal | None = None
        try:
            async for chunk in answered.chunks():
                held += chunk
                if heard_first:
                    recorder.feed(chunk)
                try:
                    # A client could not use a part of an event, and an error could not follow it.
                    if not (self.store and recorder.done) and (end := _end_of_events(held, len(chunk))):
                        await self.exchange.send(self.passed(bytes(held[:end]), recorder))
                        del held[:end]
                        if not begun:
                            begun = True
                            await asyncio.sleep(0)  # the first token is on its way before anything else is done
                finally:
                    # Also if the client has left: it may have all that it wants.
                    if not heard_first:
                        recorder.feed(chunk)
                if len(held) > EVENT_BYTES:
                    raise Refusal(502, "engine_broke_off", f"the engine sent an event of more than {EVENT_BYTES} bytes")
        except Refusal as refused:
            # What comes after the end is not missed.
            broken = None if recorder.done else refused
        answer = recorder.end()
        if broken is None and not answer.whole:
            broken = Refusal(502, "engine_broke_off", "the engine ended its stream before the answer", retryable=True)
        if broken is None and self.store:
            try:
                await turn.end(self.kept(turn, answer))
            except AgentStateError as error:
                broken = refusal(error)
        if broken is not None:
            logger.warning("a stream of %s ends with an error: %s", self.path, broken.message)
            self.metrics.gateway_broken_streams.labels(self.dialect.name).inc()
            last = self.broken(broken)
        else:
            last = self.passed(bytes(held), recorder)
        await self.exchange.send(last, last=True)

    def passed(self, events: bytes, recorder: Stream) -> bytes:
        """Events as the client gets them."""
        return events

    def broken(self, refused: Refusal) -> bytes:
        """What a stream that breaks ends with."""
        return refused.event(self.exchange.anthropic) + self.dialect.end_of_stream

    async def whole(self, answered: Answered, turn: Turn) -> None:
        """Pass on an answer in one piece, or an error."""
        if answered.status != 200:
            await self.pass_whole(answered, self.told(turn))
            return
        body = await answered.body()
        recorder = self.dialect.recorder(stream=False)
        recorder.feed(body)
        answer = recorder.end()
        if not answer.whole:
            raise Refusal(502, "engine_broke_off", "the engine's answer is not whole", retryable=True)
        if self.store:
            await turn.end(self.kept(turn, answer))
        else:
            turn.end_later(self.kept(turn, answer))
        content_type = (b"content-type", answered.content_type.encode("latin-1"))
        await self.exchange.answer(200, self.answered(body, answer), [content_type, *self.told(turn)])

    def answered(self, body: bytes, answer: Answer) -> bytes:
        """A whole answer as the client gets it."""
        return body

    def kept(self, turn: Turn, answer: Answer) -> Kept:
        """What the session keeps of the turn: where its conversation stands, entries, and a response."""
        if not answer.messages:
            return NOTHING
        new: list[NewEntry] = []
        if self.store:
            new += [_message(said) for said in self.messages[turn.begun.messages :] if said.result_of is None]
            new += [_message(said) for said in answer.messages]
        new += [_call(call, self.store) for said in answer.messages for call in said.calls]
        return Kept(self.conversation(answer.messages), new)

    @contextmanager
    def ending(self, base_url: str) -> Iterator[None]:
        """If this is cancelled, the engine is told: it does not always notice."""
        try:
            yield
        except asyncio.CancelledError:
            if not self.body.get("stream"):
                self.gateway.abort(base_url, self.request_id)
            raise


def _request_id(prefix: str) -> str:
    """Ids have one length: SGLang ends all requests whose ids begin with the one it is told to end."""
    return prefix + secrets.token_hex(16)


def _end_of_events(data: bytearray, new: int) -> int:
    """After how many bytes of ``data`` its last whole event ends, if that is among the ``new`` ones at its end."""
    begin = max(0, len(data) - new - 3)
    ends = [at + len(blank) for blank in (b"\n\n", b"\r\n\r\n") if (at := data.rfind(blank, begin)) >= 0]
    return max(ends, default=0)


def _message(said: Message) -> NewEntry:
    return NewEntry(EntryKind.MESSAGE, said.item)


def _call(call: Call, whole: bool) -> NewEntry:
    arguments = call.arguments if whole else toolcalls.beginning(call.arguments)
    return NewEntry(EntryKind.TOOL_CALL, {"name": call.name or "?", "arguments": arguments}, call.id)


def _result(said: Message, whole: bool) -> NewEntry:
    outcome = "error" if said.failed else "output"
    return NewEntry(EntryKind.TOOL_RESULT, {outcome: said.item if whole else None}, said.result_of)


def _header(value: str) -> bytes:
    """A session's id in a header: percent-encoded where it is not plain."""
    return quote(value, safe="!#$&'*+-./:=?@^_`|~ ()[]{},;<>").encode()
