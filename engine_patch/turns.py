"""The turn token of a request. It arrives in SGLang's ``session_id``, and is taken out before SGLang logs, publishes or
keeps that."""

from __future__ import annotations

from typing import Any

from agentstate.fleet import turns


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


def separate(request: Any) -> None:
    """Leave a request that comes from a client, or from another process, with the id alone."""
    if isinstance(sent := getattr(request, "session_id", None), str):
        request.session_id = RequestSession(sent)


def join(request: Any) -> None:
    """Give a request that goes to another process the token back, in a string that any encoding carries."""
    if isinstance(session := getattr(request, "session_id", None), RequestSession):
        request.session_id = session.sent
