"""Requests for what is kept here rather than to an engine: their paths, queries and bodies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar
from urllib.parse import parse_qs, unquote

from starlette.concurrency import run_in_threadpool

from agentstate.api.gateway.errors import Refusal
from agentstate.api.gateway.exchange import Exchange
from agentstate.sessions.items import ItemPage, shown
from agentstate.sessions.outcomes import Order

T = TypeVar("T")
DEFAULT_LIMIT, MAX_LIMIT = 20, 100


def segments(exchange: Exchange, prefix: str) -> list[str]:
    """What a path has behind ``prefix``; a slash in an id is sent as ``%2F``."""
    raw: bytes = exchange.scope.get("raw_path") or exchange.scope["path"].encode()
    path = raw.decode("latin-1").partition("?")[0]
    return [unquote(segment) for segment in path.removeprefix(prefix).split("/") if segment]


def query(exchange: Exchange) -> dict[str, str]:
    """Each parameter's last value."""
    given = parse_qs(exchange.scope["query_string"].decode("latin-1"), keep_blank_values=True)
    return {name: values[-1] for name, values in given.items()}


async def page(exchange: Exchange, read: Callable[[str | None, int, Order], ItemPage]) -> dict[str, object]:
    """A list of items as a query asks for it: ``after``, ``limit``, ``order``. Raises Refusal."""
    given = query(exchange)
    limit, order = given.get("limit", str(DEFAULT_LIMIT)), given.get("order", Order.DESCENDING.value)
    # Python refuses to read very long numbers.
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 9 and 1 <= int(limit) <= MAX_LIMIT):
        raise Refusal(400, "invalid_limit", f"limit is a number from 1 to {MAX_LIMIT}, not {limit[:40]!r}", "limit")
    if order not in list(Order):
        raise Refusal(400, "invalid_order", f"order is asc or desc, not {order[:40]!r}", "order")
    found = await run_in_threadpool(read, given.get("after") or None, int(limit), Order(order))
    return listed(found)


def listed(found: ItemPage) -> dict[str, object]:
    data = [shown(item) for item in found.items]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else "",
        "last_id": data[-1]["id"] if data else "",
        "has_more": found.has_more,
    }


def require(method: str, allowed: Mapping[str, T]) -> T:
    """What answers this method. Raises Refusal."""
    if method not in allowed:
        names = ", ".join(allowed)
        raise Refusal(405, "method_not_allowed", f"use {names}, not {method}", headers=[(b"allow", names.encode())])
    return allowed[method]
