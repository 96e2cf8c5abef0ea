from __future__ import annotations

import pytest

from agentstate import errors
from agentstate.api.problems import STATUS
from agentstate.errors import AgentStateError, LeaseLost, SessionBusy


def tree(root: type[AgentStateError]) -> list[type[AgentStateError]]:
    return [root, *(below for kind in root.__subclasses__() for below in tree(kind))]


def test_the_drawing_shows_every_error() -> None:
    drawn = {word for line in (errors.__doc__ or "").splitlines() for word in line.split()}
    assert [kind.__name__ for kind in tree(AgentStateError) if kind.__name__ not in drawn] == []


def test_problem_types_are_pinned() -> None:
    """They are part of the API: a client tells errors apart by them."""
    assert {kind.slug(): int(STATUS[kind]) for kind in STATUS} == {
        "session-not-found": 404,
        "entry-not-found": 404,
        "response-not-found": 404,
        "operation-not-found": 404,
        "engine-not-found": 404,
        "tool-call-not-found": 404,
        "key-not-found": 404,
        "unauthenticated": 401,
        "session-exists": 409,
        "session-busy": 409,
        "lease-lost": 409,
        "tool-in-flight": 409,
        "tool-call-claimed": 409,
        "tool-call-unknown": 409,
        "tool-call-final": 409,
        "tool-call-reused": 409,
        "idempotency-key-in-use": 409,
        "host-refused": 403,
        "not-allowed": 403,
        "session-expired": 410,
        "events-trimmed": 410,
        "revision-stale": 412,
        "model-mismatch": 412,
        "invalid-entry": 422,
        "not-a-branch-point": 422,
        "invalid-id": 422,
        "idempotency-key-reused": 422,
        "rate-limited": 429,
        "too-many-operations": 429,
        "too-many-sessions": 429,
        "database-error": 503,
        "agent-state-error": 500,
    }


def test_slugs_are_unique() -> None:
    slugs = [kind.slug() for kind in tree(AgentStateError)]
    assert len(set(slugs)) == len(slugs)


def test_what_may_succeed_later_says_so() -> None:
    assert {kind.__name__ for kind in tree(AgentStateError) if kind.retryable} == {
        "DatabaseError",
        "DatabaseFull",
        "DatabaseUnreachable",
        "SessionBusy",
        "ServiceUnreachable",
        "EngineUnreachable",
        "TooManyOperations",
        "IdempotencyKeyInUse",
        "RateLimited",
        "TierDeleting",
        "TierUnavailable",
    }


def test_the_docstring_is_the_message_unless_one_is_given() -> None:
    assert str(LeaseLost()) == "The lease is not valid any more: resume the session to get a new one."
    assert str(SessionBusy(retry_after_s=1)) == "Another process runs the session."
    assert str(LeaseLost("epoch 7 is over", revision=3)) == "epoch 7 is over"


@pytest.mark.parametrize("kind", tree(AgentStateError))
def test_every_error_has_a_message(kind: type[AgentStateError]) -> None:
    assert (kind.__doc__ or "").partition("\n")[0].endswith(".") or kind.__doc__
