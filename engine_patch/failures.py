"""Requests whose restore failed, and what of their prefix they may be restored from at their next look-up."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

# By rid: the pages that must not be restored again, and nothing after them. Nothing at all may be when there are none.
Unusable = Mapping[str, frozenset[bytes]]


class Failures:
    """What was unusable in a restore is not looked up again by the requests that it failed, whether or not the store
    serves it still: or such a request might fail for ever. Others find out for themselves.

    A request is forgotten when it is no longer queued: it runs, or has left. For the scheduler's thread.
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
        """Forget the requests that are not ``queued`` any more, which is asked for only if it matters."""
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
    """What is unusable for the requests that failed in any pool: of each pool, those that failed in it, and its word.
    A request that failed somewhere for no page's sake may be restored from nothing."""
    found: dict[str, frozenset[bytes]] = {}
    for failed, unusable in of_pools:
        for rid in failed:
            keys, before = unusable.get(rid, frozenset()), found.get(rid)
            found[rid] = keys | before if keys and before else frozenset() if before is not None else keys
    return found
