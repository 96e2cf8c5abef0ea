"""Whom the pages of this rank are charged to, and what each account may have of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping

from agentstate.fleet.quotas import NOBODY, Quota

# How many sessions' accounts are remembered. Who is forgotten is charged to nobody until its next request.
_MOST_SESSIONS = 100_000
TIERS = ("device", "host", "nvme")
_OF_ALL_RANKS = ("nvme", "shared")


class Accounts:
    """The accounts of sessions that have been served, and the quotas of accounts (`fleet.quotas`). Thread-safe."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, str] = OrderedDict()
        self._limits: dict[str, dict[str, int]] = {tier: {} for tier in (*TIERS, "shared")}

    def take(self, quotas: Mapping[str, Quota], ranks: int = 1) -> None:
        """These are the quotas from now on. ``ranks`` share device and host memory evenly; what the drive and the
        shared store may hold is said as a whole."""
        self._limits = {
            tier: {
                account: limit if tier in _OF_ALL_RANKS else limit // ranks
                for account, quota in quotas.items()
                if (limit := getattr(quota, f"{tier}_bytes")) is not None
            }
            for tier in self._limits
        }

    def note(self, session_id: str, account: str) -> None:
        """A request of the session has proven whom it is charged to."""
        self._of[session_id] = account
        if len(self._of) > _MOST_SESSIONS:
            self._of.popitem(last=False)

    def of(self, owner: Hashable | None) -> str:
        """The account of a session; `NOBODY` for whoever has proven nothing."""
        return self._of.get(owner, NOBODY)  # type: ignore[call-overload]

    def limits(self, tier: str) -> Mapping[str, int]:
        """The accounts that have a limit on a tier, in bytes."""
        return self._limits[tier]

    def limit(self, account: str, tier: str) -> int | None:
        return self._limits[tier].get(account)
