"""What one rank has: its page stores, its sessions, its control endpoint, its place in SQL and in the metrics. They are
opened together and closed in an order that loses nothing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from agentstate.errors import AgentStateError, DatabaseError, EngineError
from agentstate.fleet import engines
from agentstate.fleet.quotas import Quota, shown
from agentstate.lookahead import policies
from agentstate.lookahead.forecast import Forecast
from agentstate.pages import PageStore, Replicas, Space, StoreView
from agentstate.pages.space import Limits, largest
from agentstate.settings import ENGINE_LIMITS, Settings
from agentstate.sql.database import Database
from agentstate.tiers import shared_extents
from agentstate.tiers.pages import SharedPages
from engine_patch import choice, flags, identity
from engine_patch.accounts import TIERS, Accounts
from engine_patch.break_even import BreakEven
from engine_patch.control import ControlEndpoint
from engine_patch.decisions import Decisions
from engine_patch.foresight import ForesightStats
from engine_patch.metrics import Metrics
from engine_patch.order import OrderStats
from engine_patch.pinning import Pinning
from engine_patch.pools import DevicePool, device_pools
from engine_patch.provenance import Received
from engine_patch.restore import PreloadStats
from engine_patch.served import Served
from engine_patch.sessions import Sessions
from engine_patch.sglang_api import PoolName, get_observability, get_parallel, given_flags
from engine_patch.sharing import Sharing, SharingStats
from engine_patch.stored_pools import Share, Store, StoredPools
from engine_patch.waits import Waits

logger = logging.getLogger(__name__)

# SGLang waits 15 seconds for a scheduler that it has told to end.
_DRAIN_S = 10.0
# Of how many accounts `stat` tells.
_ACCOUNTS = 64


class Rank:
    """Opened from what SGLang constructs a linker with. A model that keeps what `device_pools` does not know gets no
    stores, and `off` says why.

    Answers the verbs of the control endpoint (`ControlEndpoint`), from that one's thread. Raises PageStoreError,
    SettingsError or EngineError where the rank cannot be opened.
    """

    def __init__(self, server_args: Any, params: Any, components: Any):
        self.settings = settings = Settings()
        self.off: str | None = None
        # The reason of a `suspend` that has not ended.
        self._suspended: str | None = None
        self._server_args = server_args
        self._flags = flags.told(given_flags(server_args))
        self.break_even = BreakEven()
        self.preload_stats = PreloadStats()
        self.order_stats = OrderStats()
        self.waits = Waits(policies.planner if settings.foresight else policies.lru)
        self.foresight_stats = ForesightStats()
        self.decided = Decisions()
        self.served = Served()
        self.received = Received()
        self.accounts = Accounts()
        self.explain_device: Callable[[str], dict[str, Any]] = lambda session_id: {}
        self.kept_by_tree: Callable[[], dict[str, int]] = dict
        self.held_on_device: Callable[[], dict[str, int]] = dict
        self.page_size: int = params.page_size
        pools: list[DevicePool] = []
        try:
            pools = device_pools(params, components, draft_model=identity.has_draft_model())
        except EngineError as error:
            self.retire(f"AgentState cannot store what this model keeps: {error}")
        self._device_pools = pools
        self._by_choice = self._restores_by_choice()
        self._group = identity.group(server_args, pools)
        self._shape = identity.shape()
        self._limits: Limits | None = None
        marks, self._space = self._identity()
        self._extents = shared_extents(settings)
        share = None if self._extents is None else Share(self._extents.tier, self._open_shared)
        replicas = self._open_replicas if identity.reads_others(settings) else None
        self.pools = StoredPools(
            pools,
            self._opening(marks, self._space),
            settings,
            self._ranks_here(),
            self.accounts,
            share,
            replicas,
            self._by_choice,
        )
        if settings.foresight and self.pools.host_tier is not None:
            self.pools.host_tier.value = lambda session_id, keys: self.waits.index(session_id, "host")
        self._control = ControlEndpoint(settings.control_address, self)
        self._engine = identity.engine(
            settings,
            server_args,
            self._space.node,
            marks[PoolName.KV],
            control_address=self._control.address,
            control_secret=self._control.secret,
        )
        if share is not None:
            self._engine = replace(self._engine, shared_store=settings.shared_store)
        self._database = database = Database(settings.sqlalchemy_url)
        self.sharing = self._open_sharing()
        # The catalog's first heartbeat may come before there are sessions.
        self.sessions: Sessions | None = None
        self.pinning = Pinning(
            self.waits,
            self.accounts,
            size=lambda session_id: self.sessions.size(session_id),
            n_bytes=self.pools.n_bytes,
            room=self._room_of,
            retain=lambda session_id, until_s: self.sessions.retain(session_id, until_s),
            fetch=lambda session_id: self.sessions.prefetch(session_id, "host", None, planned=True),
        )
        self.sessions = self._open_sessions()
        self.metrics = Metrics(self._engine) if get_observability().enable_metrics else None
        if self.metrics is not None:
            self.served.observed = self.metrics.waited
        if self.sharing is not None:
            self.sharing.start()
        self._control.serve()
        limits = {name: getattr(settings, name) for name in ENGINE_LIMITS}
        logger.info(
            "agentstate: %srank %d, %spages of %d tokens in %s: %s; database %s, control %s; %s",
            f"DP rank {self._engine.dp_rank}, " if self._engine.dp_size > 1 else "",
            self._engine.rank,
            "" if self._group.writes else f"which reads what rank {self._group.writer} writes, ",
            self.page_size,
            self._engine.pages_dir,
            self.pools.describe(),
            database.url,
            self._control.address,
            ", ".join(f"{name} {value}" for name, value in limits.items()),
        )

    def _restores_by_choice(self) -> bool:
        """Whether attention's choice is restored first."""
        if not self.settings.choice or not self._device_pools:
            return False
        if (reason := choice.hindrance(self._server_args, self._device_pools)) is not None:
            logger.warning("agentstate: AGENTSTATE_CHOICE has no effect, prefixes are restored whole: %s", reason)
        return reason is None

    def _ranks_here(self) -> int:
        """How many ranks share this machine."""
        parallel = get_parallel()
        ranks = int(parallel.tp_size) * int(parallel.dp_size)
        return max(1, ranks // int(getattr(self._server_args, "nnodes", 1)))

    def _identity(self) -> tuple[Mapping[PoolName, bytes], Space]:
        """The fingerprints of this rank's pools with the weights that are loaded, and the room of their stores."""
        of_ranks = identity.fingerprints(self._server_args, self.page_size, self._device_pools)
        space = identity.space(self.settings, of_ranks, self._group)
        space.limits = self._limits
        if not self._group.writes:
            # What an earlier release has stored for this rank alone: nobody restores it without the writer's pages.
            space.discard(identity.directories(self.settings, of_ranks, self._group.rank))
        return of_ranks[self._group.writer], space

    def _opening(self, marks: Mapping[PoolName, bytes], space: Space) -> Callable[[DevicePool], Store]:
        def open_store(pool: DevicePool) -> Store:
            mark, geometry = marks[pool.name], pool.device_pages.geometry
            directory = identity.store_directory(self.settings, mark, self._group.writer)
            if not self._group.writes:
                return StoreView(directory, mark, geometry)
            # To device memory pages are read as they are.
            codec = self.settings.pages_codec if self.settings.read_backend == "posix" else "raw"
            rows = self._by_choice and pool.name is PoolName.KV
            return PageStore(directory, mark, geometry, space=space, codec=codec, rows=rows)

        return open_store

    def _open_replicas(self, store: Store) -> Replicas:
        rank = self._group.writer
        return Replicas(store, lambda: identity.stores_of_others(self.settings, store.fingerprint, rank))

    def _open_shared(self, pool: DevicePool, store: Store) -> SharedPages:
        # Each rank has an index of its own of what is there.
        name = "shared" if self._group.writes else f"shared{self._group.rank}"
        return SharedPages(store.directory / name, self._extents, store.fingerprint, pool.device_pages.geometry)

    def _open_sharing(self) -> Sharing | None:
        if self._extents is None:
            return None
        settings = self.settings
        return Sharing(
            self._extents,
            settings.shared_store,
            self._database,
            self.pools,
            lambda: self._engine,
            through=settings.share == "through",
            evict=settings.share == "evict" and self._group.writes,
            keep_s=settings.shared_keep_s,
            limits=lambda: self.accounts.limits("shared"),
            writer=self._group.writer,
        )

    def _open_sessions(self) -> Sessions:
        sessions = Sessions(
            self.pools,
            self._engine,
            self._database,
            self.settings,
            page_size=self.page_size,
            stores=lambda: self.off is None,
            dead=self._space.take_dead,
            accounts=self.accounts,
            take=self._take,
            sharing=self.sharing,
            writer=self._group.writer,
        )
        sessions.pinned_until = self.pinning.until_s
        return sessions

    def _take(self, quotas: Mapping[str, Quota], pins: Mapping[str, tuple[str, float]]) -> None:
        """What SQL says of accounts, and of sessions of this engine that are to stay."""
        before = self.accounts.limits("nvme")
        self.accounts.take(quotas, self._group.ranks)
        if (limits := self.accounts.limits("nvme")) != before:
            self.limit_owners(limits)
        if self.sessions is not None:
            self.pinning.take(pins)

    def _room_of(self, tier: str) -> int:
        if tier == "device":
            pages = min((len(pool.device_pages) for pool in self._device_pools), default=0)
            return self.pools.n_bytes(pages)
        return 0 if self.pools.host_tier is None else self.pools.host_tier.n_bytes

    def limit_owners(self, limits: Mapping[str, int]) -> None:
        """Bound what owners of pages have on the drive, in bytes over all ranks; those that write share it evenly.
        Owners are the accounts of turns. Nobody bounds those that are not in ``limits``. From any thread."""
        of_rank = {owner: limit // self._group.writers for owner, limit in limits.items()}
        self._limits = self._space.limits = of_rank.get if of_rank else None

    def retire(self, reason: str) -> None:
        """Restore and spill nothing from now on, and say why, once: in the log and in `stat`."""
        if self.off is None or self._suspended is not None:
            logger.warning("agentstate: this engine neither stores nor restores pages: %s", reason)
            self.off, self._suspended = reason, None

    def suspend(self, reason: str) -> None:
        """Restore and spill nothing until `resume`; nothing changes when it is retired."""
        if self.off is None:
            self.off = self._suspended = reason

    @property
    def fingerprint(self) -> bytes | None:
        """What this rank's pages are valid for, 32 bytes; None while none are stored."""
        return None if self.off is not None else bytes.fromhex(self._engine.fingerprint)

    @property
    def suspended(self) -> bool:
        """Whether a `suspend` has not ended."""
        return self._suspended is not None

    def resume(self) -> None:
        """End a `suspend`."""
        if self._suspended is not None:
            self.off = self._suspended = None

    def reload(self) -> str | None:
        """Other weights were loaded from files, and the device cache is empty: store and restore what is valid for
        them. The reason, and nothing may be stored any more, where that cannot be done."""
        try:
            shape = identity.shape()
            if (reason := identity.in_the_way(self._shape, shape)) is not None:
                return reason
            marks, space = self._identity()
            mark = marks[PoolName.KV].hex()
            if mark != self._engine.fingerprint:
                if not self.sessions.stop_erasing() or not self.pools.move(self._opening(marks, space), _DRAIN_S):
                    return "its weights were updated while its drive did not answer"
                device = self.sessions.device
                # Its manifests are of the pages before; the engine is registered anew.
                self.sessions.close()
                self._space = space
                self._engine = replace(self._engine, fingerprint=mark)
                # The catalog would do so at its next heartbeat, and does when the database does not answer now.
                with suppress(DatabaseError), self._database.write() as connection:
                    engines.register(connection, self._engine)
                self.sessions = self._open_sessions()
                self.sessions.device = device
        except (AgentStateError, OSError, ValueError) as error:
            return f"its weights were updated, and their pages cannot be stored: {error}"
        self._shape = shape
        logger.info("agentstate: weights were updated: pages of %s: %s", mark[:16], self.pools.describe())
        return None

    def close(self) -> None:
        """Store what is queued, write the manifests that wait, and close everything."""
        self._control.close()
        self.sessions.stop_erasing()
        self.pools.finish_spilling(_DRAIN_S)
        # While the stores are open: they ask them what is there.
        if self.sharing is not None:
            self.sharing.close()
        self.sessions.close()
        # Before the pools: their readers may wait for a store that hangs.
        if self._extents is not None:
            self._extents.tier.close()
        self.pools.close()

    # What the control endpoint asks for.

    def flush(self, session_id: str, durability: str) -> Callable[[], dict[str, Any]]:
        if durability == "shared" and self.sharing is None:
            raise EngineError("this engine has no shared store: set AGENTSTATE_SHARED_STORE")
        return self.sessions.flush(session_id, shared=durability == "shared")

    def prefetch(
        self, session_id: str, tier: str, packed: bytes | None, due_s: float | None
    ) -> Callable[[], dict[str, Any]]:
        return self.sessions.prefetch(session_id, tier, packed, due_s)

    def demote(self, session_id: str) -> dict[str, Any]:
        self.release(session_id)
        return self.sessions.demoted(session_id)

    def foresee(self, session_id: str, packed: bytes | None, waited_s: float, kind: str) -> dict[str, Any]:
        forecast = None if packed is None else Forecast.unpack(packed)
        taken = self.settings.foresight and self.waits.foresee(session_id, forecast, waited_s, kind)
        self.foresight_stats.foreseen += taken
        self.foresight_stats.ignored += not taken
        if not taken:
            self.decided.add(session_id, "foresee", "ignored")
        return _taken(taken)

    def pin(self, session_id: str, tier: str, for_s: float) -> dict[str, Any]:
        said = self.pinning.pin(session_id, tier, for_s)
        return {**said, "tokens": said["pages"] * self.page_size}

    def release(self, session_id: str) -> dict[str, Any]:
        said = _taken(self.waits.release(session_id))
        self.decided.add(session_id, "release", said["state"])
        return said

    def explain(self, session_id: str) -> dict[str, Any]:
        """Where the session's context is, what it waits for, and what a byte of it is worth on the device; whom it is
        charged to, what that account has, and may have."""
        said = self.explain_device(session_id)
        on_device = said.pop("device_tokens", 0) // self.page_size
        pages = {"device": on_device, **self.sessions.places(session_id)}
        tiers = {
            name: {"tokens": count * self.page_size, "bytes": self.pools.n_bytes(count)}
            for name, count in pages.items()
        }
        account = self.accounts.of(session_id)
        standing = self._standing_of(account, self._held())
        where = self.sessions.page_map(session_id, on_device)
        return {"tiers": tiers, **said, **where, "account": {"name": shown(account), "tiers": standing}}

    def _held(self) -> dict[str, Counter[str]]:
        """The bytes that accounts have on this rank, by tier."""
        host = self.pools.host_tier
        return {"device": Counter(self.held_on_device()), "host": Counter() if host is None else host.held.copy()}

    def _standing_of(self, account: str, held: Mapping[str, Counter[str]]) -> dict[str, dict[str, int | None]]:
        """What an account has of what is held on this rank, and may have; on the drive, on all ranks."""
        return {
            tier: {
                "bytes": held[tier][account] if tier in held else None,
                "limit": self.accounts.limit(account, tier),
            }
            for tier in TIERS
        }

    def _accounts(self) -> dict[str, Any]:
        """The same of the accounts that have most, or have a limit."""
        held = self._held()
        total = held["device"].copy()
        total.update(held["host"])
        limited = [account for tier in TIERS for account in self.accounts.limits(tier)]
        some = dict.fromkeys([*limited, *(account for account, _ in total.most_common(_ACCOUNTS))])
        return {shown(account): self._standing_of(account, held) for account in list(some)[:_ACCOUNTS]}

    def decisions(self, after: int) -> dict[str, Any]:
        return self.decided.after(after)

    def spill(self, on: bool) -> dict[str, Any]:
        """Whether what is computed from now on is stored."""
        self.pools.spill(on)
        logger.info("agentstate: spilling is %s", "on" if on else "off: what is computed now is not stored")
        return {"state": "on" if on else "off"}

    def stat(self) -> dict[str, Any]:
        return {
            "engine": self._engine.id,
            "rank": self._engine.rank,
            "dp_rank": self._engine.dp_rank,
            "model": self._engine.model,
            "fingerprint": self._engine.fingerprint,
            "off": self.off,
            "flags": self._flags,
            **self.pools.stat(),
            **asdict(largest(self._space.owners())),
            "wear": {"bytes_day": self._space.wear.bytes_written, "budget": self._space.wear.budget},
            "break_even": asdict(self.break_even.stats),
            "preload": asdict(self.preload_stats),
            "order": asdict(self.order_stats),
            "foresight": asdict(self.foresight_stats),
            "served": asdict(self.served.stats),
            "received": asdict(self.received.stats),
            "erasures": self.sessions.erasures,
            "sharing": asdict(self.sharing.stats if self.sharing is not None else SharingStats()),
            "accounts": self._accounts(),
            "pins": len(self.waits.pins()),
            "kept": self._kept(),
        }

    def _kept(self) -> dict[str, int]:
        """What is kept for requests, sessions on their way and peers, here and in SGLang: all zero when nothing runs.
        What is stored, and the sessions that are remembered, do not count."""
        return {
            **self.kept_by_tree(),
            **self.pools.kept(),
            **self.sessions.kept(),
            "break_even_answers": self.break_even.kept,
            "waiting_peers": self._control.waiting,
        }

    def tick(self) -> None:
        self.pools.forget_erased()
        self.pools.look_for_replicas()
        if self.metrics is not None:
            self.metrics.update(self.stat())


def _taken(taken: bool) -> dict[str, Any]:
    return {"state": "accepted" if taken else "ignored"}
