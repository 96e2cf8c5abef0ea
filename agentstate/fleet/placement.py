"""Which engine a session should go to, and how much of its KV that engine can use: decided from SQL alone.

Nothing here asks an engine. A manifest lists what was durable when it was written, and every page is verified when
it is restored, so ``valid`` promises that the pages fit the engine, not that none of them has been lost since.

A rank can restore what its own node has stored, what other nodes of its machine have that it says it reads, and what
any node has put into the shared store, if it uses one: all engines are taken to share the same store.

With data parallelism an engine has several DP ranks, each of which serves requests of its own from pages of its own. A
session goes to one of them, which is a `Server` of its own here: its ranks are those that must have a page each.

Where prefill and decode are apart, a session goes to an engine that prefills: that is where its pages are restored. An
engine that decodes is no `Server`; it is asked too whether what it has decoded is stored (`decoders`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentstate.fleet.engines import Engine, Phase
from agentstate.fleet.manifests import Coverage, Durability, KvState


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
    """An engine, or one DP rank of it: the live ranks that serve a request together, under one base URL."""

    ranks: tuple[Engine, ...]

    @property
    def base_url(self) -> str:
        return self.ranks[0].base_url

    @property
    def model(self) -> str:
        return self.ranks[0].model

    @property
    def dp_rank(self) -> int | None:
        """Which DP rank of its engine it is; None where there is only one."""
        return self.ranks[0].dp_rank if self.ranks[0].dp_size > 1 else None

    @property
    def takes_tokens(self) -> bool:
        """Whether it tells a turn's token from the session's id. An engine of an earlier release has no control secret
        either, and would take both for an id."""
        return all(rank.control_secret is not None for rank in self.ranks)


@dataclass(frozen=True)
class KvOutlook:
    """What a resumed session finds. ``invalid_reason`` says why when ``valid`` is false, else it is None.
    ``durable_on`` is where all of ``tokens`` are, None where there are none."""

    state: KvState
    tokens: int
    valid: bool
    invalid_reason: str | None = None
    upper_bound: bool = False
    durable_on: Durability | None = None


def servers(live: Sequence[Engine]) -> list[Server]:
    """The engines that live ranks belong to, DP rank by DP rank, in the order of their first rank; ``live`` has the
    youngest heartbeat first, so a restarted rank counts as its new self. Without those that only decode."""
    return _servers([engine for engine in live if engine.phase is not Phase.DECODE])


def decoders(server: Server | None, live: Sequence[Engine]) -> list[Server]:
    """The engines that may decode what ``server`` prefills: those whose pages it could restore. None for one that
    decodes itself."""
    if server is None or server.ranks[0].phase is not Phase.PREFILL:
        return []
    wanted = {rank.fingerprint for rank in server.ranks}
    found = _servers([engine for engine in live if engine.phase is Phase.DECODE])
    return [other for other in found if wanted & {rank.fingerprint for rank in other.ranks}]


def _servers(live: Sequence[Engine]) -> list[Server]:
    dp_sizes: dict[str, int] = {}
    found: dict[tuple[str, int], dict[int, Engine]] = {}
    for engine in live:
        # One of before a restart with fewer or more DP ranks does not count.
        if dp_sizes.setdefault(engine.base_url, engine.dp_size) == engine.dp_size:
            found.setdefault((engine.base_url, engine.dp_rank), {}).setdefault(engine.rank, engine)
    return [Server(tuple(ranks[number] for number in sorted(ranks))) for ranks in found.values()]


def serves(server: Server, model: str) -> bool:
    """Whether requests for ``model`` can go to an engine: SGLang takes an adapter of its model as MODEL:ADAPTER.
    Whether it has loaded the adapter is not in SQL: an engine that has not answers with 400."""
    return model == server.model or model.startswith(f"{server.model}:")


def choose(model: str, stored: Stored, live: Sequence[Engine], preferred: str | None = None) -> Server | None:
    """The first of `best`."""
    return next(iter(best(model, stored, live, preferred)), None)


def best(model: str, stored: Stored, live: Sequence[Engine], preferred: str | None = None) -> list[Server]:
    """The engine for a session of ``model``: of those that serve the model (by its whole name before those of which it
    names an adapter), the one that can restore most; otherwise one that has the pages although it serves them under
    another name. Of equals, the one that has most of it on its machine, and then on its own node; of these, the one
    with the base URL ``preferred``, else the first. With data parallelism, all of its DP ranks that are equal in this.
    Empty where there is none."""

    def rank(server: Server) -> tuple[bool, bool, int, int, int, bool]:
        near = min(_on_machine(of_rank, stored) for of_rank in server.ranks)
        nearest = min(_on_node(of_rank, stored) for of_rank in server.ranks)
        exact = server.model == model
        return exact, serves(server, model), restorable(server, stored), near, nearest, server.base_url == preferred

    all_of_them = servers(live)
    first = max(all_of_them, key=rank, default=None)
    if first is None or rank(first)[1:3] <= (False, 0):
        return []
    return [one for one in all_of_them if one.base_url == first.base_url and rank(one) == rank(first)]


def spread(equal: Sequence[Server], session_id: str, running: Mapping[int, int]) -> Server | None:
    """Which one of `best` a session goes to: the DP rank with the fewest turns of those ``running`` on each. Of equals,
    one that depends on the session alone. None where there is none."""

    def load(server: Server) -> tuple[int, bytes]:
        dp_rank = server.dp_rank or 0
        return running.get(dp_rank, 0), hashlib.sha256(f"{dp_rank}\0{session_id}".encode()).digest()

    return min(equal, key=load, default=None)


def named(base_url: str, dp_rank: int | None, live: Sequence[Engine]) -> Server | None:
    """The engine that answers under ``base_url``, and of several DP ranks this one, if it is live."""
    found = (server for server in servers(live) if server.base_url == base_url)
    return next((server for server in found if server.dp_rank in (None, dp_rank)), None)


def beside(server: Server, live: Sequence[Engine]) -> list[Server]:
    """The other DP ranks of an engine."""
    found = (other for other in servers(live) if other.base_url == server.base_url)
    return [other for other in found if other.dp_rank != server.dp_rank]


def restorable(server: Server, stored: Stored) -> int:
    """Tokens that every rank of ``server`` can restore: a page counts only where all ranks have it."""
    return min(max(_on_machine(rank, stored), _shared(rank, stored)) for rank in server.ranks)


def source(rank: Engine, stored: Stored) -> tuple[Coverage, int] | None:
    """The manifest that lists most of what ``rank`` can restore, and how many of its tokens those are; of equals that
    of its own node, and then one of its machine. None where it can restore nothing."""
    found = [(near, near.tokens) for near in _of_machine(rank, stored)]
    found += [(shared, shared.shared_tokens) for shared in _of_shared(rank, stored)]
    most = max(found, key=lambda one: one[1], default=None)
    return most if most is not None and most[1] > 0 else None


def durable_on(server: Server | None, stored: Stored) -> Durability | None:
    """Where all of what ``server`` can restore is; without a server, all that was stored last. None where that is
    nothing."""
    if server is None:
        node = stored.coverage[0].node if stored.coverage else None
        last = [found for found in stored.coverage if found.node == node]
        return _durable_on(_newest_tokens(stored), all(found.shared_tokens >= found.tokens for found in last))
    tokens = restorable(server, stored)
    # An older manifest may be of another history, and says nothing of what is stored now.
    newest = [_newest(rank, stored) for rank in server.ranks]
    return _durable_on(tokens, all(found is not None and found.shared_tokens >= tokens for found in newest))


def _durable_on(tokens: int, shared: bool) -> Durability | None:
    if tokens == 0:
        return None
    return Durability.SHARED if shared else Durability.NODE


def outlook(model: str, stored: Stored, server: Server | None, live: Sequence[Engine]) -> KvOutlook:
    """What ``server``, chosen among ``live``, can use of what is stored."""
    newest = stored.coverage[0] if stored.coverage else None
    tokens = _newest_tokens(stored)
    on = durable_on(None, stored)
    if server is None:
        others = sorted({repr(other.model) for other in live})
        reason = f"no live engine serves {model!r}"
        reason = f"{reason}, only {', '.join(others)}" if others else reason
        return KvOutlook(KvState.UNKNOWN, tokens, False, reason, stored.inherited, on)
    if newest is None:
        return KvOutlook(KvState.UNKNOWN, 0, False, "no pages of this session are recorded")
    reasons = []
    state = KvState.DURABLE
    if not serves(server, model):
        reasons.append(f"the session was created for {model!r}, the engine serves {server.model!r}")
    missing = [rank for rank in server.ranks if not _of_machine(rank, stored) and _shared(rank, stored) == 0]
    if not missing:
        tokens, on = restorable(server, stored), durable_on(server, stored)
        of_newest = any(newest.fingerprint == rank.fingerprint for rank in server.ranks)
        if not of_newest or not all(_is_whole(rank, stored) for rank in server.ranks) or stored.inherited:
            state = KvState.PARTIAL
    elif not any(coverage.fingerprint == rank.fingerprint for rank in missing for coverage in stored.coverage):
        if len(missing) == len(server.ranks):
            reasons.append(
                f"fingerprint: the pages are of {newest.fingerprint}, the engine is {missing[0].fingerprint}"
            )
        else:
            state, tokens = KvState.LOST, 0
            reasons.append(f"rank {missing[0].rank} of the engine has stored no pages")
    else:
        state, tokens = KvState.LOST, 0
        reasons.append(_elsewhere(missing[0], stored, newest))
    if tokens == 0:
        state, on = KvState.LOST if not missing else state, None
    return KvOutlook(state, tokens, not reasons, "; ".join(reasons) or None, stored.inherited and tokens > 0, on)


def _elsewhere(rank: Engine, stored: Stored, newest: Coverage) -> str:
    where = f"the pages are on node {newest.node}"
    if rank.shared_store:
        where += " and not in the shared store"
    elif any(found.shared_tokens for found in stored.coverage if found.fingerprint == rank.fingerprint):
        where += " and in a shared store that the engine does not use"
    return f"{where}, the engine is on {rank.node}"


def _newest_tokens(stored: Stored) -> int:
    return stored.coverage[0].tokens if stored.coverage else 0


def _newest(rank: Engine, stored: Stored) -> Coverage | None:
    """The newest that is stored for a rank, on any node."""
    return next((found for found in stored.coverage if found.fingerprint == rank.fingerprint), None)


def _of_machine(rank: Engine, stored: Stored) -> list[Coverage]:
    """What a rank's own node has stored, and then what the others have that it reads, the newest first."""
    of_rank = [found for found in stored.coverage if found.fingerprint == rank.fingerprint]
    own = [found for found in of_rank if found.node == rank.node]
    return own + [found for found in of_rank if found.node != rank.node and found.node in rank.reads]


def _on_machine(rank: Engine, stored: Stored) -> int:
    return max((found.tokens for found in _of_machine(rank, stored)), default=0)


def _on_node(rank: Engine, stored: Stored) -> int:
    return max((found.tokens for found in _of_machine(rank, stored) if found.node == rank.node), default=0)


def _of_shared(rank: Engine, stored: Stored) -> list[Coverage]:
    """Of what is stored for a rank, what is in the shared store, if it uses one."""
    if not rank.shared_store:
        return []
    return [found for found in stored.coverage if found.fingerprint == rank.fingerprint and found.shared_tokens > 0]


def _shared(rank: Engine, stored: Stored) -> int:
    return max((found.shared_tokens for found in _of_shared(rank, stored)), default=0)


def _is_whole(rank: Engine, stored: Stored) -> bool:
    """Whether a rank can restore all that its session had after its newest turn."""
    newest = _newest(rank, stored)
    if newest is None or newest.lost_tokens:
        return False
    if newest.node == rank.node or newest.node in rank.reads:
        return True
    return bool(rank.shared_store) and newest.shared_tokens >= newest.tokens
