"""Requests whose restore failed, and how much of their prefix their next look-up may restore."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

# By rid: pages that must not be restored again, nor anything after them. An empty set rules out the whole prefix.
Unusable = Mapping[str, frozenset[bytes]]

# Stands for copies in memory that were at fault and are gone: what is stored may be restored.
NO_STORED_PAGE = b""


class Failures:
    """A request whose restore failed does not look up the unusable pages again, even if the store still serves them:
    otherwise it might fail for ever. Other requests find out for themselves.

    A request is forgotten when it is no longer queued, because it runs or has left. For the scheduler's thread.
    """

    def __init__(self) -> None:
        self._unusable: dict[str, frozenset[bytes]] = {}

    def add(self, unusable: Unusable) -> None:
        """The restores of these requests have failed."""
        self._unusable.update(unusable)

    def usable(self, rid: str, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, from the first on, the request may be restored from."""
        unusable = self._unusable.get(rid)
        if unusable is None:
            return len(keys)
        if not unusable:
            return 0
        return next((page for page, key in enumerate(keys) if key in unusable), len(keys))

    def tidy(self, queued: Callable[[], Collection[str]]) -> None:
        """Forget the requests that are no longer ``queued``, which is called only if it matters."""
        if self._unusable:
            rids = queued()
            self._unusable = {rid: keys for rid, keys in self._unusable.items() if rid in rids}

    @property
    def kept(self) -> int:
        """How many requests are not forgotten."""
        return len(self._unusable)

    def clear(self) -> None:
        self._unusable.clear()


def together(of_pools: Iterable[tuple[Collection[str], Unusable]]) -> dict[str, frozenset[bytes]]:
    """The unusable pages of every request that failed in any pool. ``of_pools`` has, for each pool, the requests that
    failed in it and its unusable pages. For a request that failed in some pool without a page to blame, nothing may
    be restored."""
    found: dict[str, frozenset[bytes]] = {}
    for failed, unusable in of_pools:
        for rid in failed:
            keys, before = unusable.get(rid, frozenset()), found.get(rid)
            found[rid] = keys | before if keys and before else frozenset() if before is not None else keys
    return found
