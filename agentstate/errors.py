"""Every error that AgentState raises on purpose.

::

    AgentStateError
    ├── SettingsError                a setting is wrong, or the machine does not allow it
    ├── DatabaseError                the database refused or aborted a statement
    │   ├── DatabaseUnreachable      no connection: server down, directory missing or not writable
    │   ├── DatabaseFull             its disk is full
    │   ├── SchemaOutdated           the schema is older than this version: migrate it
    │   └── SchemaNewer              the schema is newer than this version: upgrade AgentState
    ├── SessionError                 the session does not allow this now
    │   ├── SessionNotFound
    │   ├── SessionExists            the id is taken
    │   ├── SessionExpired
    │   ├── SessionBusy              someone else holds the lease; carries ``retry_after_s``
    │   ├── LeaseLost                the lease lapsed, was released or was taken over
    │   ├── ToolInFlight             a tool call is claimed and has no result
    │   ├── EntryNotFound
    │   ├── InvalidEntry             an entry that would make the transcript inconsistent
    │   ├── NotABranchPoint          a history cannot be forked or rewound at this entry
    │   ├── RevisionStale            the session changed after the caller saw it
    │   ├── ToolCallNotFound
    │   ├── ToolCallClaimed          another caller executes the tool call, or did
    │   ├── ToolCallUnknown          the tool call's claimant vanished: nobody knows whether it ran
    │   ├── ToolCallFinal            the tool call has a result already
    │   ├── ToolCallReused           the id belongs to another tool call
    │   ├── EventsTrimmed            the session never had the event to follow it from
    │   └── ModelMismatch            the session runs another model than the caller expects
    ├── InvalidId                    an id that no session and no tool call can have
    ├── ResponseNotFound             no response of OpenAI's API with this id is kept
    ├── OperationNotFound
    ├── EngineNotFound
    ├── TooManyOperations            the service follows as many operations as it can
    ├── TooManySessions              the tenant has as many sessions as it may
    ├── IdempotencyKeyReused         another request used the Idempotency-Key before
    ├── IdempotencyKeyInUse          the first request with the Idempotency-Key is still being answered
    ├── Unauthenticated              no valid API key
    ├── HostRefused                  without API keys the service answers only under this machine's names
    ├── NotAllowed                   the API key's role does not allow this
    ├── RateLimited                  the tenant sends too many requests; carries ``retry_after_s``
    ├── KeyNotFound                  there is no such API key
    ├── RequestRefused               the service refused the request itself (seen by clients only)
    ├── ServiceUnreachable           the service did not answer (seen by clients only)
    │   └── NotAgentState            what answers at its address is something else (seen by clients only)
    ├── EngineError
    │   ├── EngineUnreachable        no answer in time; the engine may still act on the request
    │   └── EngineRefused            the engine answered with an error
    ├── PageStoreError
    │   ├── PageStoreLocked          another process owns the store directory
    │   ├── PageStoreUnwritable
    │   ├── PageStoreFull
    │   │   └── OwnerFull            an owner's limit leaves no space for its pages
    │   ├── FingerprintMismatch      pages of another model, layout or format
    │   └── BadExtent                an extent file is damaged, or is none of ours
    │       ├── UnknownFormat        the extent is intact, in a format that this release does not read
    │       └── MacMismatch          a shared extent has no MAC of a key that is known here
    └── TierError                    a store that engines share could not do what was asked
        ├── TierMissing              there is no such extent
        │   └── TierShort            it ends too early
        ├── TierUnavailable          no answer, or one that may be another later
        ├── TierDeleting             the extent is being deleted: publish it again once it is gone
        └── TierRefused              an operator has to do something first
            └── TierForeign          the store is not this installation's

The first line of a class's docstring is its default message. ``retryable`` says whether the same call may succeed later
without a change by the caller. Over HTTP an error's problem type is its ``slug``, its name in kebab case, so **renaming
a class changes the API**.
"""

from __future__ import annotations

import re
from typing import ClassVar


class AgentStateError(Exception):
    """AgentState could not do what was asked."""

    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None):
        super().__init__(message or (type(self).__doc__ or "").partition("\n")[0])

    @classmethod
    def slug(cls) -> str:
        """The last part of the error's problem type, e.g. ``lease-lost``."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()


class SettingsError(AgentStateError):
    """A setting is not usable on this machine."""


class DatabaseError(AgentStateError):
    """The database refused the statement."""

    retryable = True


class DatabaseUnreachable(DatabaseError):
    """The database cannot be reached."""


class DatabaseFull(DatabaseError):
    """The disk of the database is full."""


class SchemaOutdated(DatabaseError):
    """The database schema is older than this version of AgentState: run `agentstate db upgrade`."""

    retryable = False


class SchemaNewer(DatabaseError):
    """The database schema is newer than this version of AgentState: upgrade AgentState."""

    retryable = False


class SessionError(AgentStateError):
    """The session does not allow this now.

    ``revision`` is the session's revision when the error was raised, or None if there is none.
    """

    def __init__(self, message: str | None = None, *, revision: int | None = None):
        super().__init__(message)
        self.revision = revision


class SessionNotFound(SessionError):
    """There is no such session."""


class SessionExists(SessionError):
    """The session id is taken."""


class SessionExpired(SessionError):
    """The session has expired."""


class SessionBusy(SessionError):
    """Another process runs the session.

    ``retry_after_s`` is when its lease lapses unless renewed; the lease may be released earlier.
    """

    retryable = True

    def __init__(self, message: str | None = None, *, retry_after_s: float, revision: int | None = None):
        super().__init__(message, revision=revision)
        self.retry_after_s = retry_after_s


class LeaseLost(SessionError):
    """The lease is not valid any more: resume the session to get a new one."""


class ToolInFlight(SessionError):
    """A tool call of the session is claimed and has no result yet."""


class EntryNotFound(SessionError):
    """There is no such entry in the session."""


class InvalidEntry(SessionError):
    """The entry would make the transcript inconsistent."""


class NotABranchPoint(SessionError):
    """A history cannot be forked or rewound to there."""


class RevisionStale(SessionError):
    """The session has changed since: reload it."""


class ToolCallNotFound(SessionError):
    """There is no such tool call in the session."""


class ToolCallClaimed(SessionError):
    """The tool call is claimed: another one executes it, or did."""


class ToolCallUnknown(SessionError):
    """The claimant of the tool call vanished: it may have run or not."""


class ToolCallFinal(SessionError):
    """The tool call has a result already."""


class ToolCallReused(SessionError):
    """The id is that of another tool call: of another tool, or with other arguments."""


class EventsTrimmed(SessionError):
    """The session never had that event: read it."""


class ModelMismatch(SessionError):
    """The session runs another model than the caller expects."""


class InvalidId(AgentStateError):
    """No session and no tool call can have this id."""


class ResponseNotFound(AgentStateError):
    """There is no such response."""


class OperationNotFound(AgentStateError):
    """There is no such operation."""


class EngineNotFound(AgentStateError):
    """There is no such engine."""


class TooManyOperations(AgentStateError):
    """The service follows as many operations as it can: try again later."""

    retryable = True


class TooManySessions(AgentStateError):
    """The tenant has as many sessions as it may: delete some, or wait until some expire."""


class IdempotencyKeyReused(AgentStateError):
    """The Idempotency-Key came with another request before."""


class IdempotencyKeyInUse(AgentStateError):
    """The first request with this Idempotency-Key is still being answered."""

    retryable = True


class Unauthenticated(AgentStateError):
    """A valid API key is needed."""


class HostRefused(AgentStateError):
    """Without API keys the service answers under a name of its own machine only."""


class NotAllowed(AgentStateError):
    """The API key may not do this: its role reads, or is not that of an administrator."""


class RateLimited(AgentStateError):
    """The tenant sends more requests than it may.

    ``retry_after_s`` is when the next request will be answered.
    """

    retryable = True

    def __init__(self, message: str | None = None, *, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class KeyNotFound(AgentStateError):
    """There is no such API key."""


class RequestRefused(AgentStateError):
    """The service refused the request.

    A client raises this for an answer that no other class of this tree covers; ``status`` is the HTTP status.
    """

    def __init__(self, message: str | None = None, *, status: int):
        super().__init__(message)
        self.status = status


class ServiceUnreachable(AgentStateError):
    """The AgentState service did not answer."""

    retryable = True


class NotAgentState(ServiceUnreachable):
    """What answers is no AgentState service, or one of another release."""

    retryable = False


class EngineError(AgentStateError):
    """The engine could not do what was asked."""


class EngineUnreachable(EngineError):
    """The engine did not answer in time; it may still act on the request."""

    retryable = True


class EngineRefused(EngineError):
    """The engine answered with an error."""


class PageStoreError(AgentStateError):
    """The page store could not do what was asked."""


class PageStoreLocked(PageStoreError):
    """Another process owns the page store directory."""


class PageStoreUnwritable(PageStoreError):
    """The page store directory is not writable."""


class PageStoreFull(PageStoreError):
    """There is no space left for pages."""


class OwnerFull(PageStoreFull):
    """An owner's limit leaves no space for pages of this owner."""


class FingerprintMismatch(PageStoreError):
    """The pages belong to another model, layout or format version."""


class BadExtent(PageStoreError):
    """The extent file is damaged, or not an extent."""


class UnknownFormat(BadExtent):
    """The extent is of a format that this release does not read."""


class MacMismatch(BadExtent):
    """The extent has no message authentication code of a key that is known here."""


class TierError(AgentStateError):
    """The shared store could not do what was asked."""


class TierMissing(TierError):
    """There is no such extent in the shared store."""


class TierShort(TierMissing):
    """The extent in the shared store ends too early."""


class TierUnavailable(TierError):
    """The shared store does not answer now."""

    retryable = True


class TierDeleting(TierError):
    """The extent is being deleted from the shared store."""

    retryable = True


class TierRefused(TierError):
    """The shared store refuses this until an operator changes something."""


class TierForeign(TierRefused):
    """The shared store is not this installation's, as far as its database knows."""
