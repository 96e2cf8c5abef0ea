"""OpenAI's Conversations: each is a session, and its items are entries of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool

from agentstate.api.gateway import resources, responses
from agentstate.api.gateway.errors import Refusal
from agentstate.api.gateway.exchange import Exchange
from agentstate.api.gateway.stored import locked, no_conversation
from agentstate.errors import EntryNotFound, SessionBusy, SessionExpired, SessionNotFound
from agentstate.sessions import belonging, items
from agentstate.sessions.items import Item, ItemPage
from agentstate.sessions.outcomes import Session
from agentstate.sessions.stored import Stored

if TYPE_CHECKING:
    from agentstate.api.gateway.app import Gateway

MAX_ITEMS = 20
MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512


async def answer(gateway: Gateway, exchange: Exchange) -> None:
    """A request for a conversation, its items, or a new one."""
    resource = _Resource(gateway, exchange)
    path = resources.segments(exchange, "/v1/conversations")
    conversation = path[0] if path else ""
    try:
        await resource.answer(path)
    except (SessionNotFound, SessionExpired):
        raise no_conversation(conversation) from None
    except SessionBusy:
        raise locked(conversation) from None
    except EntryNotFound as error:
        at_path = len(path) > 2
        raise Refusal(
            404 if at_path else 400, "item_not_found", str(error), "item_id" if at_path else "after"
        ) from None


class _Resource:
    def __init__(self, gateway: Gateway, exchange: Exchange):
        self._gateway = gateway
        self._exchange = exchange
        self._stored = Stored(gateway.service.database, exchange.tenant.id)

    async def answer(self, path: list[str]) -> None:
        handlers: dict[str, Any]
        match path:
            case []:
                handlers = {"POST": self._create}
            case [_]:
                handlers = {"GET": self._read, "POST": self._update, "DELETE": self._delete}
            case [_, "items"]:
                handlers = {"GET": self._list, "POST": self._add}
            case [_, "items", _]:
                handlers = {"GET": self._item, "DELETE": self._remove}
            case _:
                raise Refusal(404, "not_found", f"there is no {self._exchange.scope['path']} here")
        handle = resources.require(self._exchange.scope["method"], handlers)
        await self._exchange.answer_document(await handle(*path[:1], *path[2:]))

    async def _create(self) -> dict[str, Any]:
        body = await self._body()
        metadata, given = _metadata(body), _items(body)
        return _conversation(await run_in_threadpool(self._stored.create, metadata, given))

    async def _read(self, conversation: str) -> dict[str, Any]:
        return _conversation(await run_in_threadpool(self._stored.read, conversation))

    async def _update(self, conversation: str) -> dict[str, Any]:
        metadata = _metadata(await self._body())
        return _conversation(await run_in_threadpool(self._stored.update, conversation, metadata))

    async def _delete(self, conversation: str) -> dict[str, Any]:
        sessions = self._gateway.service.sessions.of(self._exchange.tenant.id)
        await run_in_threadpool(sessions.delete, belonging.conversation(conversation), None)
        return {"id": conversation, "object": "conversation.deleted", "deleted": True}

    async def _list(self, conversation: str) -> dict[str, Any]:
        return await resources.page(
            self._exchange,
            lambda after, limit, order: self._stored.items(conversation, after=after, limit=limit, order=order),
        )

    async def _add(self, conversation: str) -> dict[str, Any]:
        given = _items(await self._body())
        if not given:
            raise Refusal(400, "invalid_request", "there is nothing to add: give one item or more", "items")
        added = await run_in_threadpool(self._stored.add, conversation, given)
        return resources.listed(ItemPage(added, has_more=False))

    async def _item(self, conversation: str, item: str) -> dict[str, Any]:
        return items.shown(await run_in_threadpool(self._stored.item, conversation, item))

    async def _remove(self, conversation: str, item: str) -> dict[str, Any]:
        return _conversation(await run_in_threadpool(self._stored.remove, conversation, item))

    async def _body(self) -> dict[str, Any]:
        """The body's JSON object; without a body an empty one."""
        most_bytes = self._gateway.settings.gateway_body_bytes
        return (await self._exchange.document(most_bytes, or_none=True))[1]


def _conversation(session: Session) -> dict[str, Any]:
    return {
        "id": session.id,
        "object": "conversation",
        "created_at": session.created_us // 1_000_000,
        "metadata": session.metadata,
    }


def _metadata(body: dict[str, Any]) -> dict[str, Any]:
    """Raises Refusal."""
    metadata = body.get("metadata")
    if metadata is None:
        return {}
    fits = (
        isinstance(metadata, dict)
        and len(metadata) <= MAX_PAIRS
        and all(len(key) <= MAX_KEY for key in metadata)
        and all(isinstance(value, str) and len(value) <= MAX_VALUE for value in metadata.values())
    )
    if not fits:
        raise Refusal(
            400,
            "invalid_metadata",
            f"metadata is up to {MAX_PAIRS} texts of up to {MAX_VALUE} characters, by keys of up to {MAX_KEY}",
            "metadata",
        )
    return dict(metadata)


def _items(body: dict[str, Any]) -> list[Item]:
    """Raises Refusal."""
    given = body.get("items")
    if given is None:
        return []
    try:
        responses.messages({"input": given} if given != "" else {})
    except ValueError as error:
        raise Refusal(400, "invalid_items", str(error).replace("input", "items"), "items") from None
    if not isinstance(given, list):
        raise Refusal(400, "invalid_items", "items must be a list of objects", "items")
    if len(given) > MAX_ITEMS:
        raise Refusal(
            400, "too_many_items", f"{len(given)} items are more than the {MAX_ITEMS} that may come at once", "items"
        )
    return given
