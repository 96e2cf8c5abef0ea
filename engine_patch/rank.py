"""What one rank has: its page stores, its sessions, its control endpoint, its place in SQL and in the metrics. They are
opened together and closed in an order that loses nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from agentstate.database import Database
from agentstate.errors import EngineError
from agentstate.pages import PageStore
from agentstate.settings import ENGINE_LIMITS, Settings
from engine_patch import identity
from engine_patch.break_even import BreakEven
from engine_patch.control import ControlEndpoint
from engine_patch.metrics import Metrics
from engine_patch.pools import DevicePool, device_pools
from engine_patch.sessions import Sessions
from engine_patch.sglang_api import PoolName, get_observability, get_parallel
from engine_patch.stored_pools import StoredPools

logger = logging.getLogger(__name__)

# SGLang waits 15 seconds for a scheduler that it has told to end.
_DRAIN_S = 10.0


class Rank:
    """Opened from what SGLang constructs a linker with. A model that keeps what `device_pools` does not know gets no
    stores, and `off` says why.

    Answers the verbs of the control endpoint (`ControlEndpoint`), from that one's thread. Raises PageStoreError,
    SettingsError or EngineError where the rank cannot be opened.
    """

    def __init__(self, server_args: Any, params: Any, components: Any):
        self.settings = settings = Settings()
        self.off: str | None = None
        self.break_even = BreakEven()
        self.page_size: int = params.page_size
        pools: list[DevicePool] = []
        try:
            pools = device_pools(params, components)
        except EngineError as error:
            self.retire(f"AgentState cannot store what this model keeps: {error}")
        of_ranks = identity.fingerprints(server_args, self.page_size, pools)
        marks = of_ranks[rank := get_parallel().tp_rank]
        space = identity.space(settings, of_ranks)

        def open_store(pool: DevicePool) -> PageStore:
            mark = marks[pool.name]
            directory = identity.store_directory(settings, mark, rank)
            return PageStore(directory, mark, pool.device_pages.geometry, space=space)

        self.pools = StoredPools(pools, open_store, settings)
        self._control = ControlEndpoint(settings.control_address, self)
        self._engine = identity.engine(settings, server_args, space.node, marks[PoolName.KV], self._control.address)
        database = Database(settings.sqlalchemy_url)
        self.sessions = Sessions(
            self.pools,
            self._engine,
            database,
            settings,
            page_size=self.page_size,
            stores=lambda: self.off is None,
            dead=space.take_dead,
        )
        self.metrics = Metrics(self._engine) if get_observability().enable_metrics else None
        self._control.serve()
        limits = {name: getattr(settings, name) for name in ENGINE_LIMITS}
        logger.info(
            "agentstate: rank %d, pages of %d tokens in %s: %s; database %s, control %s; %s",
            self._engine.rank,
            self.page_size,
            settings.pages_path.absolute(),
            self.pools.describe(),
            database.url,
            self._control.address,
            ", ".join(f"{name} {value}" for name, value in limits.items()),
        )

    def retire(self, reason: str) -> None:
        """Restore and spill nothing from now on, and say why, once: in the log and in `stat`."""
        if self.off is None:
            logger.warning("agentstate: this engine neither stores nor restores pages: %s", reason)
            self.off = reason

    def close(self) -> None:
        """Store what is queued, write the manifests that wait, and close everything."""
        self._control.close()
        self.pools.finish_spilling(_DRAIN_S)
        # While the stores are open: it asks them what manifests may say.
        self.sessions.close()
        self.pools.close()

    # What the control endpoint asks for.

    def flush(self, session_id: str) -> dict[str, Any]:
        return self.sessions.standing(session_id)

    def prefetch(self, session_id: str, tier: str, packed: bytes | None) -> Callable[[], dict[str, Any]]:
        return self.sessions.prefetch(session_id, tier, packed)

    def demote(self, session_id: str) -> dict[str, Any]:
        return self.sessions.demote(session_id)

    def spill(self, on: bool) -> dict[str, Any]:
        """Whether what is computed from now on is stored."""
        self.pools.spill(on)
        logger.info("agentstate: spilling is %s", "on" if on else "off: what is computed now is not stored")
        return {"state": "on" if on else "off"}

    def stat(self) -> dict[str, Any]:
        return {
            "engine": self._engine.id,
            "rank": self._engine.rank,
            "model": self._engine.model,
            "fingerprint": self._engine.fingerprint,
            "off": self.off,
            **self.pools.stat(),
            "break_even": asdict(self.break_even.stats),
        }

    def tick(self) -> None:
        if self.metrics is not None:
            self.metrics.update(self.stat())
