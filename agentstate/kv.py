"""Which engine a session should go to, and what of its KV that engine can use: decided from SQL alone.

Nothing here asks an engine. A manifest lists what was durable when it was written, and every page is verified when
it is restored, so ``valid`` promises that the pages fit the engine, not that none of them has been lost since.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentstate.engines import Engine
from agentstate.manifests import Coverage, KvState


@dataclass(frozen=True)
class KvOutlook:
    """What a resumed session finds. ``invalid_reason`` says why when ``valid`` is false, else it is None."""

    state: KvState
    tokens: int
    valid: bool
    invalid_reason: str | None = None


def choose_engine(model: str, coverage: Coverage | None, live: Sequence[Engine]) -> Engine | None:
    """The engine for a session of ``model``: one that serves the model and has the pages, else one that serves the
    model, else one that has the pages although it serves them under another name. Of equals, the first."""

    def rank(engine: Engine) -> int:
        return 2 * (engine.model == model) + _has_pages(engine, coverage)

    best = max(live, key=rank, default=None)
    return best if best is not None and rank(best) > 0 else None


def outlook(model: str, coverage: Coverage | None, engine: Engine | None, live: Sequence[Engine]) -> KvOutlook:
    """What ``engine``, chosen among ``live``, can use of what ``coverage`` lists."""
    tokens = coverage.tokens if coverage else 0
    if engine is None:
        others = sorted({repr(other.model) for other in live})
        reason = f"no live engine serves {model!r}"
        return KvOutlook(KvState.UNKNOWN, tokens, False, f"{reason}, only {', '.join(others)}" if others else reason)
    if coverage is None:
        return KvOutlook(KvState.UNKNOWN, 0, False, "no pages of this session are recorded")
    reasons = []
    if engine.model != model:
        reasons.append(f"the session was created for {model!r}, the engine serves {engine.model!r}")
    if engine.fingerprint != coverage.fingerprint:
        reasons.append(f"fingerprint: the pages are of {coverage.fingerprint}, the engine is {engine.fingerprint}")
    elif engine.node != coverage.node:
        reasons.append(f"the pages are on node {coverage.node}, the engine is on {engine.node}")
    return KvOutlook(KvState.DURABLE, tokens, not reasons, "; ".join(reasons) or None)


def _has_pages(engine: Engine, coverage: Coverage | None) -> bool:
    return coverage is not None and engine.fingerprint == coverage.fingerprint and engine.node == coverage.node
