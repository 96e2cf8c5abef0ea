"""Which engine a session should go to, and how much of its KV that engine can use: decided from SQL alone.

Nothing here asks an engine. A manifest lists what was durable when it was written, and every page is verified when
it is restored, so ``valid`` promises that the pages fit the engine, not that none of them has been lost since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentstate.fleet.engines import Engine
from agentstate.fleet.manifests import Coverage, KvState


@dataclass(frozen=True)
class Stored:
    """What is stored of a session, the newest first, wherever it is.

    ``inherited`` if it was stored before the session was forked or rewound: its pages are shared as far as the
    tokens are the same, so its tokens are an upper bound.
    """

    coverage: Sequence[Coverage] = ()
    inherited: bool = False


@dataclass(frozen=True)
class Server:
    """An engine: the live ranks that answer under one base URL."""

    ranks: tuple[Engine, ...]

    @property
    def base_url(self) -> str:
        return self.ranks[0].base_url

    @property
    def model(self) -> str:
        return self.ranks[0].model

    @property
    def takes_tokens(self) -> bool:
        """Whether it tells a turn's token from the session's id. An engine of an earlier release has no control secret
        either, and would take both for an id."""
        return all(rank.control_secret is not None for rank in self.ranks)


@dataclass(frozen=True)
class KvOutlook:
    """What a resumed session finds. ``invalid_reason`` says why when ``valid`` is false, else it is None."""

    state: KvState
    tokens: int
    valid: bool
    invalid_reason: str | None = None
    upper_bound: bool = False


def servers(live: Sequence[Engine]) -> list[Server]:
    """The engines that live ranks belong to, in the order of their first rank; ``live`` has the youngest heartbeat
    first, so a restarted rank counts as its new self."""
    found: dict[str, dict[int, Engine]] = {}
    for engine in live:
        found.setdefault(engine.base_url, {}).setdefault(engine.rank, engine)
    return [Server(tuple(ranks[number] for number in sorted(ranks))) for ranks in found.values()]


def choose(model: str, stored: Stored, live: Sequence[Engine], preferred: str | None = None) -> Server | None:
    """The engine for a session of ``model``: of those that serve the model, the one that can restore most; otherwise
    one that has the pages although it serves them under another name. Of equals, the one with the base URL
    ``preferred``, else the first."""

    def rank(server: Server) -> tuple[bool, int, bool]:
        return server.model == model, restorable(server, stored), server.base_url == preferred

    best = max(servers(live), key=rank, default=None)
    return best if best is not None and rank(best)[:2] > (False, 0) else None


def named(base_url: str, live: Sequence[Engine]) -> Server | None:
    """The engine that answers under ``base_url``, if it is live."""
    return next((server for server in servers(live) if server.base_url == base_url), None)


def restorable(server: Server, stored: Stored) -> int:
    """Tokens that every rank of ``server`` has stored on its node: a page counts only where all ranks have it."""
    found = _of_server(server, stored)
    return min((0 if coverage is None else coverage.tokens) for coverage in found.values())


def outlook(model: str, stored: Stored, server: Server | None, live: Sequence[Engine]) -> KvOutlook:
    """What ``server``, chosen among ``live``, can use of what is stored."""
    newest = stored.coverage[0] if stored.coverage else None
    tokens = newest.tokens if newest else 0
    if server is None:
        others = sorted({repr(other.model) for other in live})
        reason = f"no live engine serves {model!r}"
        reason = f"{reason}, only {', '.join(others)}" if others else reason
        return KvOutlook(KvState.UNKNOWN, tokens, False, reason, stored.inherited)
    if newest is None:
        return KvOutlook(KvState.UNKNOWN, 0, False, "no pages of this session are recorded")
    reasons = []
    state = KvState.DURABLE
    if server.model != model:
        reasons.append(f"the session was created for {model!r}, the engine serves {server.model!r}")
    found = _of_server(server, stored)
    missing = [rank for rank, coverage in found.items() if coverage is None]
    if not missing:
        tokens = restorable(server, stored)
        newest_here = any(coverage == newest for coverage in found.values())
        lost = any(coverage is not None and coverage.lost_tokens for coverage in found.values())
        if not newest_here or lost or stored.inherited:
            state = KvState.PARTIAL
    elif not any(coverage.fingerprint == rank.fingerprint for rank in missing for coverage in stored.coverage):
        if len(missing) == len(found):
            reasons.append(
                f"fingerprint: the pages are of {newest.fingerprint}, the engine is {missing[0].fingerprint}"
            )
        else:
            state, tokens = KvState.LOST, 0
            reasons.append(f"rank {missing[0].rank} of the engine has stored no pages")
    else:
        state, tokens = KvState.LOST, 0
        reasons.append(f"the pages are on node {newest.node}, the engine is on {missing[0].node}")
    if tokens == 0 and not missing:
        state = KvState.LOST
    return KvOutlook(state, tokens, not reasons, "; ".join(reasons) or None, stored.inherited and tokens > 0)


def _of_server(server: Server, stored: Stored) -> Mapping[Engine, Coverage | None]:
    return {
        rank: next(
            (found for found in stored.coverage if (found.fingerprint, found.node) == (rank.fingerprint, rank.node)),
            None,
        )
        for rank in server.ranks
    }
