"""OpenAI's Responses with what is kept of them: the conversation that a request goes on with, and its answer.

An engine gets a request that has all of it: what came before in ``input``, and nothing that asks the engine to keep
anything.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool

from agentstate.api.gateway import documents, resources
from agentstate.api.gateway.errors import Refusal
from agentstate.api.gateway.exchange import LONG_BYTES, Exchange
from agentstate.api.gateway.recording import UNKNOWN_FORM, Answer, Events, Stream
from agentstate.api.gateway.relay import Relay
from agentstate.api.gateway.responses import TERMINAL
from agentstate.api.gateway.turns import NOTHING, Kept, Turn
from agentstate.errors import (
    EntryNotFound,
    ResponseNotFound,
    SessionBusy,
    SessionExpired,
    SessionNotFound,
)
from agentstate.fleet.placement import Server
from agentstate.sessions.belonging import State, Wanted
from agentstate.sessions.items import Item, kind_of
from agentstate.sessions.responses import NewResponse
from agentstate.sessions.stored import Stored

if TYPE_CHECKING:
    from agentstate.api.gateway.app import Gateway

_OPENING = frozenset({"response.created", "response.in_progress"})
_BLANK_LINE = re.compile(rb"(?<=\n\n)|(?<=\r\n\r\n)")
# One statement has them all.
MOST_REFERENCES = 512
_KEPT = ("completed", "incomplete")
# What a response says of its request, and its value where the request says nothing.
_ECHOED: dict[str, Any] = {
    "background": False,
    "frequency_penalty": 0.0,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "prompt_cache_key": None,
    "reasoning": None,
    "safety_identifier": None,
    "service_tier": "default",
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": None,
    "truncation": "disabled",
}


class StoredRelay(Relay):
    """A request for a response. ``given`` is what its session has to keep of its input."""

    rewrites = True
    state = State()
    given: Sequence[Item] = ()
    _opening = True
    _response: dict[str, Any] | None = None  # as it was last told
    _completed_at: int | None = None
    _sent = b""  # the newest events that are numbered

    def check(self) -> None:
        body = self.body
        if body.get("background"):
            raise Refusal(
                400, "unsupported", "responses are not made in the background here: leave it out", "background"
            )
        if body.get("prompt") is not None:
            raise Refusal(400, "unsupported", "there are no prompt templates here: send the prompt itself", "prompt")
        if not isinstance(body.get("store"), bool | None):
            raise Refusal(400, "invalid_request", "store is true or false", "store")
        self.state = _state(body)
        if self.state.conversation is not None and self.identity.session not in (None, self.state.conversation):
            raise Refusal(
                400, "invalid_request", "a request has one session or one conversation, not two", "conversation"
            )
        given = body.get("input")
        self.given = [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given or []

    async def complete(self) -> bool:
        given = self.given
        # Only a short body is looked through here: the chunks of other streams wait meanwhile.
        wanted = await run_in_threadpool(_wanted, given) if len(self.raw) > LONG_BYTES else _wanted(given)
        if not wanted:
            return False
        if len(wanted) > MOST_REFERENCES:
            raise Refusal(400, "too_many_items", f"a request may refer to {MOST_REFERENCES} items", "input")
        most_bytes = self.gateway.settings.gateway_body_bytes
        found = await run_in_threadpool(
            _stored(self.gateway, self.exchange).referred,
            wanted,
            most_bytes,
            session=self.state.conversation or self.identity.session or self.identity.harness,
            response=self.state.response,
        )
        if found is None:
            raise _too_large("refers to", most_bytes)
        if missing := sorted(wanted.keys() - found.keys()):
            raise Refusal(
                400,
                "item_not_found",
                f"Item with id '{missing[0][:80]}' not found. Items are kept if `store` is not false.",
                "input",
            )
        self.given = self.body["input"] = [found[item["id"]] if _refers(item) else item for item in given]
        return True

    def is_stored(self) -> bool:
        return self.body.get("store") is not False

    def wanted(self, server: Server) -> Wanted:
        wanted = super().wanted(server)
        if self.store:
            # They are kept with the items that they are, once the answer is there.
            wanted = replace(wanted, results=())
        if self.state != State():
            return replace(wanted, harness=None, conversation=None, state=self.state)
        return replace(wanted, state=self.state if self.store else None)

    async def begin(self, wanted: Wanted) -> Turn:
        conversation, response = self.state.conversation, self.state.response
        try:
            return await super().begin(wanted)
        except ResponseNotFound:
            raise _no_previous(response) from None
        except SessionBusy:
            if conversation is None:
                raise
            raise locked(conversation) from None
        except (SessionNotFound, SessionExpired):
            if conversation is None:
                raise
            raise no_conversation(conversation) from None

    async def prepare(self, turn: Turn) -> None:
        """Complete the request with what it goes on from."""
        if turn.session is None:
            self.store = False  # SQL does not answer
        body = {
            name: value for name, value in self.body.items() if name not in ("conversation", "previous_response_id")
        }
        if (context := turn.begun.context) is not None:
            try:
                most_bytes = self.gateway.settings.gateway_body_bytes
                before = await run_in_threadpool(_stored(self.gateway, self.exchange).recall, context, most_bytes)
            except (EntryNotFound, SessionNotFound, SessionExpired):
                raise _no_previous(self.state.response) from None
            if before is None:
                raise _too_large("goes on from", most_bytes)
            body["input"] = [*before, *self.given]
            self.messages = self.heard(body)
            if turn.begun.whole:
                self.given = body["input"]
        self.raw = self.dumped({**body, "store": False, "request_id": self.request_id})

    def kept(self, turn: Turn, answer: Answer) -> Kept:
        if not self.store:
            return super().kept(turn, answer)
        if answer.response is None or answer.response.get("status") not in _KEPT:
            return NOTHING
        document = self.told_of(answer.response)
        response = NewResponse(
            self.request_id,
            document,
            self.given if turn.begun.whole or turn.begun.context else self.unknown(turn.begun.messages),
            [item for item in document["output"] if isinstance(item, dict)],
            turn.begun.time_us,
            turn.begun.base,
            turn.begun.whole,
        )
        return Kept(self.conversation(answer.messages), response=response)

    def unknown(self, messages: int) -> Sequence[Item]:
        """The items behind the first messages of the request, which its session has kept."""
        left = messages - bool(self.body.get("instructions"))
        for number, item in enumerate(self.given):
            if left <= 0:
                return self.given[number:]
            if kind_of(item) != "reasoning":
                left -= 1
        return ()

    def told_of(self, response: dict[str, Any]) -> dict[str, Any]:
        """A response as its client gets it: the engine knows nothing of what is kept, and leaves things out."""
        conversation = self.state.conversation
        completed = response.get("status") == "completed"
        if completed and self._completed_at is None:
            self._completed_at = int(time.time())
        echoed = _echo(self.body)
        told = {name: value for name, value in response.items() if value is not None or name not in echoed}
        if isinstance(text := told.get("text"), dict):
            told["text"] = {**_ECHOED["text"], **text}
        return {
            **echoed,
            **told,
            "completed_at": self._completed_at if completed else None,
            "id": self.request_id,
            "output": response.get("output") or [],
            "usage": response.get("usage"),
            "previous_response_id": self.state.response,
            "conversation": None if conversation is None else {"id": conversation},
            "store": self.store,
        }

    def answered(self, body: bytes, answer: Answer) -> bytes:
        return body if answer.response is None else documents.dumps(self.told_of(answer.response))

    def passed(self, events: bytes, recorder: Stream) -> bytes:
        if b'"sequence_number"' in events:
            self._sent = events
        if not self._opening and not recorder.done:
            return events
        return b"".join(self._passed(event, recorder) for event in _BLANK_LINE.split(events))

    def _passed(self, event: bytes, recorder: Stream) -> bytes:
        for _, payload in Events().feed(event):
            try:
                document = documents.loads(payload)
                kind = document["type"]
                if kind in TERMINAL:
                    told = recorder.told().response or document["response"]
                elif kind in _OPENING:
                    told = document["response"]
                else:
                    self._opening = False
                    return event
                self._response = self.told_of(told)
            except UNKNOWN_FORM:
                return event
            return _event({**document, "response": self._response})
        return event

    def broken(self, refused: Refusal) -> bytes:
        response = {
            "object": "response",
            "created_at": 0,
            "model": self.model or "",
            "incomplete_details": None,
            **self.told_of(self._response or {}),
            "status": "failed",
            "error": {"code": "server_error", "message": refused.message},
        }
        number = -1
        for _, payload in Events().feed(self._sent):
            with suppress(*UNKNOWN_FORM):
                number = documents.loads(payload)["sequence_number"]
        return _event({"type": "response.failed", "sequence_number": number + 1, "response": response})


def _wanted(given: Any) -> Counter[str]:
    """The ids of the items that an input refers to, and how often."""
    return Counter(item["id"] for item in given if _refers(item)) if isinstance(given, list) else Counter()


def _refers(item: Any) -> bool:
    """Whether an item of a request's input stands for one that is kept. OpenAI lets the type be left out."""
    if not isinstance(item, dict) or not isinstance(item.get("id"), str):
        return False
    return item.get("type") == "item_reference" or {key for key in item if item[key] is not None} == {"id"}


def _echo(body: dict[str, Any]) -> dict[str, Any]:
    """What a response says of its request. A tier is named by the engine, or is the default one."""
    said = {name: body[name] for name in _ECHOED if body.get(name) is not None}
    if said.get("service_tier") == "auto":
        del said["service_tier"]
    return {**_ECHOED, **said}


def _event(document: dict[str, Any]) -> bytes:
    kind: str = document["type"]
    return b"event: " + kind.encode() + b"\ndata: " + documents.dumps(document) + b"\n\n"


def _state(body: dict[str, Any]) -> State:
    """What a request goes on from. Raises Refusal."""
    conversation, response = body.get("conversation"), body.get("previous_response_id")
    if isinstance(conversation, dict):
        conversation = conversation.get("id", 0)
    for value, name in ((conversation, "conversation"), (response, "previous_response_id")):
        if not isinstance(value, str | None):
            raise Refusal(400, "invalid_request", f"{name} must be an id", name)
    if conversation and response:
        raise Refusal(
            400,
            "mutually_exclusive_parameters",
            "a request goes on from a conversation or from a response, not from both: leave one of them out",
            "previous_response_id",
        )
    return State(conversation or None, response or None)


def _too_large(does: str, most_bytes: int) -> Refusal:
    message = f"the request {does} more than {most_bytes} bytes: see AGENTSTATE_GATEWAY_BODY_BYTES"
    return Refusal(413, "context_too_large", message)


def _no_previous(response: str | None) -> Refusal:
    message = f"Previous response with id '{response}' not found."
    return Refusal(400, "previous_response_not_found", message, "previous_response_id")


def no_conversation(conversation: str) -> Refusal:
    return Refusal(404, "conversation_not_found", f"Conversation with id '{conversation}' not found.", "conversation")


def locked(conversation: str) -> Refusal:
    """SDKs would retry 409 on their own."""
    message = f"Another response is being made in conversation {conversation}: wait until it has ended."
    return Refusal(400, "conversation_locked", message, "conversation")


def _stored(gateway: Gateway, exchange: Exchange) -> Stored:
    return Stored(gateway.service.database, exchange.tenant.id)


async def answer(gateway: Gateway, exchange: Exchange) -> None:
    """A request for a response that is there."""
    stored, method = _stored(gateway, exchange), exchange.scope["method"]
    response, *rest = resources.segments(exchange, "/v1/responses/")
    try:
        match rest:
            case [] if response in ("compact", "input_tokens"):
                raise Refusal(400, "unsupported", f"/v1/responses/{response} is not supported here")
            case []:
                handle = resources.require(method, {"GET": _retrieve, "DELETE": _delete})
                await handle(stored, exchange, response)
            case ["input_items"]:
                resources.require(method, {"GET": None})
                await exchange.answer_document(
                    await resources.page(
                        exchange,
                        lambda after, limit, order: stored.given(response, after=after, limit=limit, order=order),
                    )
                )
            case ["cancel"]:
                raise Refusal(
                    400, "unsupported", "only responses in the background can be cancelled: there are none here"
                )
            case ["input_tokens"] | ["compact"]:
                raise Refusal(400, "unsupported", f"/v1/responses/{rest[0]} is not supported here")
            case _:
                raise Refusal(404, "not_found", f"there is no {exchange.scope['path']} here")
    except ResponseNotFound:
        raise Refusal(404, "response_not_found", f"Response with id '{response}' not found.", "response_id") from None
    except EntryNotFound as error:
        raise Refusal(400, "item_not_found", str(error), "after") from None


async def _retrieve(stored: Stored, exchange: Exchange, response: str) -> None:
    given = resources.query(exchange)
    if given.get("stream", "false").lower() not in ("false", "0", "") or "starting_after" in given:
        raise Refusal(400, "unsupported", "a response is retrieved whole, not as a stream: leave stream out", "stream")
    await exchange.answer_document(await run_in_threadpool(stored.response, response))


async def _delete(stored: Stored, exchange: Exchange, response: str) -> None:
    await run_in_threadpool(stored.forget, response)
    await exchange.answer_document({"id": response, "object": "response", "deleted": True})
