"""The turn of a request, as a gateway hands it over or the request's body says. Its token arrives in SGLang's
``session_id``, and is taken out before SGLang logs, publishes or keeps that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agentstate.fleet import turns
from agentstate.fleet.handover import Handover


class RequestSession(str):
    """The id of a request's session, to SGLang a string like any other, and the ``token`` that came with it; None if
    nothing has a token's form."""

    token: str | None

    def __new__(cls, sent: str) -> RequestSession:
        if isinstance(sent, RequestSession):
            return sent
        session_id, token = turns.split(sent)
        session = super().__new__(cls, session_id)
        session.token = token
        return session

    @property
    def sent(self) -> str:
        """What the client sent."""
        return str(self) if self.token is None else f"{self}.{self.token}"

    def __reduce__(self) -> tuple[Any, ...]:
        return RequestSession, (self.sent,)


def handed_over(http: Any) -> Handover | None:
    """What an HTTP request's headers hand over. Raises ValueError for headers that cannot be read."""
    return Handover.read(getattr(http, "headers", {}))


def take_over(request: Any, http: Any) -> None:
    """Set what the HTTP request's headers hand over, before SGLang has normalized the request: with a batch or several
    samples, all are of the turn. Leaves alone what has no session: embeddings. Raises ValueError for headers that
    cannot be read."""
    if not hasattr(request, "session_id") or (handover := handed_over(http)) is None:
        return
    request.session_id, request.cache_salt, request.extra_key = handover.session, handover.salt, handover.extra_key
    if handover.request_id is not None:
        request.rid = handover.request_id


def take_over_id(request: Any, http: Any) -> None:
    """Give a request of the Responses API, whose id its answer has, the id that is handed over. Raises ValueError for
    headers that cannot be read."""
    handover = handed_over(http)
    if handover is not None and handover.request_id is not None:
        request.request_id = handover.request_id


def separate(request: Any) -> None:
    """Leave a request that comes from a client, or from another process, with the id alone."""
    if isinstance(sent := getattr(request, "session_id", None), str):
        request.session_id = RequestSession(sent)


def route(request: Any, dp_ranks: Callable[[], int]) -> None:
    """Send a request to the DP rank that its turn's token names, of as many as ``dp_ranks`` says there are; one whose
    client has chosen a rank goes there. The token is not proven here: who may send a request may choose its rank."""
    session = getattr(request, "session_id", None)
    if not isinstance(session, RequestSession) or session.token is None:
        return
    named = turns.named_dp_rank(session.token)
    # The engine may have been restarted with fewer since.
    if named is not None and getattr(request, "routed_dp_rank", named) is None and named < dp_ranks():
        request.routed_dp_rank = named


def join(request: Any) -> None:
    """Give a request that goes to another process the token back, in a string that any encoding carries."""
    if isinstance(session := getattr(request, "session_id", None), RequestSession):
        request.session_id = session.sent
