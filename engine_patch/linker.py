"""The linker: what SGLang's radix cache calls to store pages and to bring them back. One a scheduler process, that is
one a rank; it owns the rank's page store, its threads, its control endpoint and its place in SQL."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from agentstate import ids
from agentstate.database import Database
from agentstate.engines import Engine
from agentstate.errors import EngineError
from agentstate.manifests import Manifest, split_keys
from agentstate.pages import PageStore, Quota, fingerprint, weights_digest
from agentstate.settings import ENGINE_LIMITS, Settings
from engine_patch.break_even import BreakEven
from engine_patch.catalog import Catalog
from engine_patch.control import ControlEndpoint
from engine_patch.device_tier import DeviceTier, Progress
from engine_patch.ledger import Ledger
from engine_patch.metrics import Metrics
from engine_patch.pools import DevicePool, device_pools
from engine_patch.restore import Finished, Restored, Source
from engine_patch.sglang_api import (
    SUPPORTED,
    PoolName,
    PoolTransfer,
    RadixKey,
    UnifiedCacheLinker,
    get_model,
    get_observability,
    get_parallel,
    get_serving,
    get_storage_hash_str,
)
from engine_patch.stored_pools import StoredPools, keys_of
from engine_patch.transfer import DevicePages

logger = logging.getLogger(__name__)

# SGLang waits 15 seconds for a scheduler that it has told to end.
_DRAIN_S = 10.0


class AgentStateLinker(UnifiedCacheLinker):
    """Implements SGLang's linker contract over one rank's page stores.

    ``pools`` names the device pools it serves. Look-ups answer from memory; loads and offloads run on threads of their
    own. A model that keeps what `device_pools` does not know is served all the same, and nothing of it is stored.
    Constructed by SGLang with keyword arguments of its choosing.
    """

    def __init__(
        self, server_args: Any, params: Any, *, components: Any, extra_config: Any, forward_stream: Any = None
    ):
        settings = Settings()
        self._prefetch_ttl_s = settings.prefetch_ttl_s
        self.drive_timeout_s = settings.drive_timeout_s
        self._break_even = BreakEven()
        self._computes = settings.break_even
        self.reads_ahead = settings.read_ahead
        self._cached = 0
        self._off: str | None = None
        self.forward_stream = forward_stream
        self.page_size: int = params.page_size
        pools: list[DevicePool] = []
        try:
            pools = device_pools(params, components)
        except EngineError as error:
            self.retire(f"AgentState cannot store what this model keeps: {error}")
        rank = get_parallel().tp_rank
        quota = _quota(settings, pools)
        fields = _fingerprint_fields(self.page_size, pools)
        mark = fingerprint(**fields, pool=PoolName.KV.value)

        def open_store(pool: DevicePool, pages: DevicePages) -> PageStore:
            own = fingerprint(**fields, pool=pool.name.value)
            directory = settings.pages_path.absolute() / own.hex()[:32] / f"rank{rank}"
            return PageStore(directory, own, pages.geometry, quota[pool.name])

        self._pools = StoredPools(pools, open_store, settings)
        self.layer_done_counter = self._pools.gate
        self.pools = self._pools.device_pages
        if PoolName.MAMBA in self.pools:
            # The state has readers of its own, which do not come by the KV pool.
            params.req_to_token_pool.register_layer_transfer_counter(self.layer_done_counter)
        self._ledger = Ledger(self.page_size, self._pools.n_bytes, self._pools.durable)
        # Of each session, the newest request whose pages are not stored yet: its ticket and its tokens.
        self._unsettled: dict[str, tuple[object, RadixKey]] = {}
        self._settling = threading.Lock()
        self.device_tier: DeviceTier | None = None
        self._control = ControlEndpoint(
            settings.control_address,
            standing=self._standing,
            stat=self.stat,
            prefetch=self._prefetch,
            demote=self._demote,
            spill=self._spill,
            tick=self._tick,
        )
        self._engine = Engine(
            id=ids.new("eng"),
            node=socket.gethostname(),
            rank=rank,
            control_address=self._control.address,
            base_url=settings.engine_base_url or f"http://{_reachable(server_args.host)}:{server_args.port}/v1",
            model=get_serving().served_model_name or get_model().model_path,
            fingerprint=mark.hex(),
            pages_dir=str(settings.pages_path.absolute()),
        )
        database = Database(settings.sqlalchemy_url)
        self._catalog = Catalog(
            database,
            self._engine,
            settings.heartbeat_interval_s,
            saved=self._ledger.saved,
            needed=self._need_only,
            stored=self._pools.durable,
            lost=lambda: self._pools.lost_needed,
            n_bytes=self._pools.n_bytes,
        )
        self._metrics = Metrics(self._engine) if get_observability().enable_metrics else None
        limits = {name: getattr(settings, name) for name in ENGINE_LIMITS}
        logger.info(
            "agentstate: rank %d, pages of %d tokens in %s: %s; database %s, control %s; %s",
            rank,
            self.page_size,
            settings.pages_path.absolute(),
            self._pools.describe(),
            database.url,
            self._control.address,
            ", ".join(f"{name} {value}" for name, value in limits.items()),
        )

    def retire(self, reason: str) -> None:
        """Restore and spill nothing from now on, and say why, once: in the log and in `stat`."""
        if self._off is None:
            logger.warning("agentstate: this engine neither stores nor restores pages: %s", reason)
            self._off = reason

    # What the radix cache asks for, in the order of a request's life.

    def matching(self, cached: int) -> None:
        """The next `lookup` is for a request with so many tokens on the device, which its own arguments leave out."""
        self._cached = cached

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Every restorable prefix length, in pages; none where computing the longest one is faster (`BreakEven`), or
        while the drive does not answer."""
        if not self.restores:
            return []
        full = next(transfer for transfer in transfers if transfer.name == PoolName.KV)
        keys = keys_of(full)
        lengths = self._pools.restorable(keys)
        if self._computes and lengths and self._is_computed(rid, keys[: lengths[-1]]):
            return []
        return lengths

    def _is_computed(self, rid: str, keys: list[bytes]) -> bool:
        # What is in memory already costs next to nothing.
        return not self._pools.staged_for(keys) and self._break_even.computes(
            rid, self._cached, len(keys) * self.page_size, self._pools.n_bytes(len(keys))
        )

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        return self._off is None and self._pools.load(rid, transfers)

    def cancel_queued_load(self, rid: str) -> bool:
        return self._pools.cancel(rid)

    def start_layer_wise_loading(self) -> int:
        return self._pools.start(self._device_events())

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        found = self.finish(counter_index)
        if found.writing:
            self.quarantine(found)
        return not found.failed

    def finish(self, counter_index: int) -> Finished:
        """Wait like `finish_layer_wise_loading`, and tell which requests failed, instead of whether one did, and what
        was restored."""
        found = self._pools.finish(counter_index)
        if (restored := found.restored) is not None:
            for rid, of_request in restored.requests.items():
                logger.info(
                    "agentstate: restored %d tokens for %s, %.1f MB in %.1f ms (%.2f GB/s), source %s",
                    of_request.pages * self.page_size,
                    rid,
                    of_request.n_bytes / 1e6,
                    restored.seconds * 1e3,
                    of_request.n_bytes / 1e9 / restored.seconds,
                    " and ".join(sorted(of_request.sources)),
                )
            if self._metrics is not None:
                self._metrics.restored(restored)
        return found

    def quarantine(self, found: Finished) -> None:
        """Quarantine a batch's device pages until `release_quarantine`: a pending read on some rank may still write to
        them."""
        logger.warning("agentstate: device pages that a drive may still write to are quarantined until it answers")
        self._pools.quarantine(found.numbers)

    def release_quarantine(self) -> None:
        """End the quarantine of device pages."""
        logger.warning("agentstate: the drive has answered; the quarantine of device pages is over")
        self._pools.release_quarantine()

    def stepped(self, parts: Sequence[tuple[int, int]], seconds: float, restored: Restored | None) -> None:
        """A step of the engine took ``seconds`` to compute, of each of its requests, so many new tokens after so many
        that it had (``parts``: had, new), ``restored`` among them."""
        if restored is None:
            self._break_even.stepped(parts, seconds)
        elif restored.sources == {Source.COLD}:
            self._break_even.restored(parts, seconds, restored.n_bytes, restored.waited_s)

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        return self._off is None and self._pools.offer(transfers, self._device_events)

    def num_completed_offloads(self) -> int:
        return self._pools.results

    def pop_completed_offload(self) -> bool:
        return self._pools.pop_result()

    def request_finished(self, session_id: str, key: RadixKey) -> None:
        """A request of a session has ended with the tokens of ``key`` in the tree: publish its manifest as soon as
        its pages are. Its keys are computed on the spilling thread, not the scheduler's."""
        if self._off is not None:
            # What is stored is not its newest request's any more.
            self._ledger.forget(session_id)
            return
        request, ticket = self._ledger.finished(session_id), object()
        with self._settling:
            self._unsettled[session_id] = ticket, key

        def settle() -> None:
            with self._settling:
                newest, key = self._unsettled.get(session_id, (None, None))
                if newest is not ticket:
                    # The manifest is that of the newest request, whose turn is still to come. So a drive that hangs
                    # keeps the tokens of one request a session, and not of all.
                    return
                del self._unsettled[session_id]
            keys = [bytes.fromhex(text) for text in get_storage_hash_str(key, page_size=self.page_size)]
            durable = self._pools.durable(keys, use=True)
            if self._off is None:
                self._ledger.settled(session_id, request, keys, durable)
            else:
                self._ledger.forget(session_id)
            self._pools.need([keys[:durable]])
            self._pools.merge(keys[:durable])
            self._catalog.save(self._manifest(session_id, keys, durable))

        self._pools.then(settle)

    # Ahead of a request, and beside them.

    def read_ahead(self, rid: str, keys: Sequence[str]) -> None:
        """Begin to read what a request that waits is going to load."""
        if self._off is None:
            self._pools.read_ahead(rid, [bytes.fromhex(key) for key in keys])

    def tidy(self, waiting: Callable[[], Collection[str]]) -> None:
        """Let go of what was read for requests that are not ``waiting`` any more."""
        self._pools.tidy(waiting)

    @property
    def restores(self) -> bool:
        """Whether anything can be restored: not once it is retired, nor while the drive does not answer."""
        return self._off is None and not self.stuck

    @property
    def stuck(self) -> bool:
        """Whether the drive has not answered in time, and does not yet: it may still write to device pages."""
        return self._pools.stuck

    @property
    def quarantines_pages(self) -> bool:
        """Whether device pages are in quarantine."""
        return self._pools.quarantines

    def preload(self, rid: str, keys: list[bytes], slots: torch.Tensor) -> int:
        """Load pages for no request, into slots that the caller owns: the number of a batch, to ask `landed` and
        `finish` with."""
        return self._pools.preload(rid, keys, slots, self._device_events())

    def landed(self, batch: int) -> bool:
        return self._pools.landed(batch)

    def stored(self, keys: Sequence[str]) -> bool:
        """Whether all of these pages are stored."""
        return self._pools.durable([bytes.fromhex(key) for key in keys]) == len(keys)

    @property
    def lost(self) -> int:
        """How many pages that were stored have been lost since the start."""
        return self._pools.lost

    def drain(self) -> None:
        """Wait until nothing reads or writes device memory."""
        self._pools.drain()

    def reset(self) -> None:
        """Quiesce for a flush of the device cache. What is stored stays stored."""
        self._pools.reset()
        if self.quarantines_pages:
            self.release_quarantine()

    def close(self) -> None:
        self._control.close()
        self._pools.finish_spilling(_DRAIN_S)
        # While the stores are open: it asks them what manifests may say.
        self._catalog.close()
        self._pools.close()

    # What the control endpoint asks for.

    def stat(self) -> dict[str, Any]:
        return {
            "engine": self._engine.id,
            "rank": self._engine.rank,
            "model": self._engine.model,
            "fingerprint": self._engine.fingerprint,
            "off": self._off,
            **self._pools.stat(),
            "break_even": asdict(self._break_even.stats),
        }

    def _standing(self, session_id: str) -> dict[str, Any]:
        standing = self._ledger.standing(session_id)
        if standing is None and self._off is None and (manifest := self._catalog.load(session_id)) is not None:
            keys = manifest.page_keys()
            lost = manifest.lost_tokens // self.page_size
            return self._ledger.remembered(self._pools.durable(keys), len(keys) + lost)
        return standing or {"state": "unknown", "tokens": 0, "pages": 0, "bytes": 0}

    def _chain(self, session_id: str) -> list[bytes]:
        """The session's pages that were stored when its newest request had ended."""
        if (keys := self._ledger.chain(session_id)) is not None:
            return keys
        manifest = self._catalog.load(session_id)
        return [] if manifest is None else manifest.page_keys()

    def _prefetch(self, session_id: str, tier: str, packed: bytes | None) -> Callable[[], dict[str, Any]]:
        """Begin to bring a session's pages nearer, those of ``packed`` or all that are known: what tells how far that
        is, as of now. Goes on with what has begun already.

        ``tier`` is ``device`` or ``host``; where the device cannot be reached (`DeviceTier`), host memory is.
        """
        if tier not in ("host", "device"):
            raise ValueError(f"tier {tier!r} is neither host nor device")
        chain = self._chain(session_id) if packed is None else split_keys(packed)
        keys = chain[: self._pools.durable(chain, use=True)] if self._off is None else []
        whole = "warm" if len(keys) == len(chain) else "partial"
        if not keys:
            return lambda: self._answer("cold", 0, tier)
        device = self.device_tier.prefetch(session_id, keys) if tier == "device" and self.device_tier else None
        if device is not None:
            states = {Progress.RUNNING: "pending", Progress.DONE: whole, Progress.FAILED: "cold"}
            return lambda: self._answer(states[device()], len(keys), tier)
        staged = self._pools.prefetch(session_id, keys, self._prefetch_ttl_s)

        def answer() -> dict[str, Any]:
            if (fraction := staged()) is None:
                return self._answer("pending", len(keys), "host")
            if fraction == 1:
                return self._answer(whole, len(keys), "host")
            # A part of every page, by layers: so much less of it is left to be read.
            pages = int(fraction * len(keys))
            return self._answer("partial" if pages else "cold", pages, "host")

        return answer

    def _demote(self, session_id: str) -> dict[str, Any]:
        if self.device_tier is None:
            raise EngineError("the engine is not up yet")
        self.device_tier.demote(session_id)
        return self._answer("demoted", len(self._ledger.chain(session_id) or ()), "device")

    def _spill(self, on: bool) -> dict[str, Any]:
        self._pools.spill(on)
        logger.info("agentstate: spilling is %s", "on" if on else "off: what is computed now is not stored")
        return {"state": "on" if on else "off"}

    def _answer(self, state: str, pages: int, tier: str) -> dict[str, Any]:
        """``pages`` are those that the state is about; nothing of a session that is ``cold`` is anywhere."""
        pages = 0 if state == "cold" else pages
        tokens = pages * self.page_size
        return {"state": state, "tokens": tokens, "pages": pages, "bytes": self._pools.n_bytes(pages), "tier": tier}

    def _need_only(self, chains: Iterable[list[bytes]]) -> None:
        self._pools.need(chains, only=True)

    def _tick(self) -> None:
        if self._metrics is not None:
            self._metrics.update(self.stat())

    def _device_events(self) -> Sequence[torch.cuda.Event]:
        """After these, everything that was launched so far has read and written its device pages. A CPU launches
        nothing: its forwards are over when they return."""
        return self.record_offload_ready() if self._pools.device.type == "cuda" else ()

    def _manifest(self, session_id: str, keys: list[bytes], durable: int) -> Manifest:
        return Manifest(
            session_id=session_id,
            fingerprint=self._engine.fingerprint,
            rank=self._engine.rank,
            node=self._engine.node,
            engine_id=self._engine.id,
            page_size=self.page_size,
            tokens=durable * self.page_size,
            keys=b"".join(keys[:durable]),
            nbytes=self._pools.n_bytes(durable),
            lost_tokens=(len(keys) - durable) * self.page_size,
        )


def _quota(settings: Settings, pools: list[DevicePool]) -> dict[PoolName, Quota]:
    """Each pool's part of what this rank may keep, by what a page of it takes."""
    sizes = {pool.name: pool.pages.geometry.page_bytes for pool in pools}
    ranks = get_parallel().tp_size
    return {
        name: Quota(
            None if settings.pages_quota is None else settings.pages_quota * size // sum(sizes.values()) // ranks,
            settings.pages_free_fraction,
        )
        for name, size in sizes.items()
    }


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host


def _fingerprint_fields(page_size: int, pools: list[DevicePool]) -> dict[str, Any]:
    """What a page of any of ``pools`` is valid for: of all of them, since each is computed from the others."""
    model, parallel = get_model(), get_parallel()
    return dict(
        sglang=SUPPORTED,
        weights=weights_digest(_checkpoint(model.model_path, model.revision)),
        loader=[str(model.load_format), str(model.model_loader_extra_config)],
        quantization_params=str(model.quantization_param_path),
        rl_quantization=str(model.rl_quant_profile),
        model_overrides=str(model.json_model_override_args),
        dtype=str(model.dtype),
        quantization=str(model.quantization),
        pools=[pool.layout() for pool in pools],
        page_size=page_size,
        rank=parallel.tp_rank,
        tp_size=parallel.tp_size,
        pp_size=parallel.pp_size,
    )


def _checkpoint(model_path: str, revision: str | None) -> Path:
    """Where the weights are: ``model_path`` itself, or where the hub's cache keeps that model."""
    if Path(model_path).exists():
        return Path(model_path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_path, revision=revision, local_files_only=True))
