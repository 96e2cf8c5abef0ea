"""The linker: what SGLang's radix cache calls to store pages and to bring them back. One a scheduler process, that is
one a rank; it owns the rank's page store, its threads, its control endpoint and its place in SQL."""

from __future__ import annotations

import dataclasses
import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agentstate import ids
from agentstate.database import Database
from agentstate.engines import Engine
from agentstate.errors import EngineError
from agentstate.manifests import Manifest
from agentstate.pages import LayerwiseReader, PageStore, fingerprint, weights_digest
from agentstate.settings import Settings
from engine_patch.catalog import Catalog
from engine_patch.control import ControlEndpoint
from engine_patch.ledger import Ledger
from engine_patch.restore import Restorer
from engine_patch.sglang_api import (
    SUPPORTED,
    MHATokenToKVPool,
    MLATokenToKVPool,
    PoolName,
    PoolTransfer,
    RadixKey,
    UnifiedCacheLinker,
    get_model,
    get_parallel,
    get_serving,
    get_storage_hash_str,
)
from engine_patch.spill import Spiller
from engine_patch.transfer import DevicePages

logger = logging.getLogger(__name__)


class AgentStateLinker(UnifiedCacheLinker):
    """Implements SGLang's linker contract over one rank's page store.

    ``pools`` names the one device pool it serves, full-attention KV. Look-ups answer from memory; loads and offloads
    run on threads of their own. Constructed by SGLang with keyword arguments of its choosing.
    """

    def __init__(
        self, server_args: Any, params: Any, *, components: Any, extra_config: Any, forward_stream: Any = None
    ):
        settings = Settings()
        self._retired = False
        self.forward_stream = forward_stream
        self.page_size: int = params.page_size
        pool = params.token_to_kv_pool_allocator.get_kvcache()
        tensors = _kv_tensors(pool)
        self._pages = DevicePages(tensors, self.page_size)
        geometry = self._pages.geometry
        rank = get_parallel().tp_rank
        rows = [list(tensor.shape[1:]) for tensor in tensors[0]]
        mark = _fingerprint(self.page_size, str(pool.dtype), rows, len(tensors))
        directory = settings.pages_path.absolute() / mark.hex()[:32] / f"rank{rank}"
        self._store = PageStore(directory, mark, geometry)
        self._spiller = Spiller(self._store, self._pages, settings.spill_staging_bytes)
        reader = LayerwiseReader(geometry, staging_bytes=settings.staging_bytes, threads=settings.read_threads)
        self._restorer = Restorer(self._store, self._pages, reader)
        self.layer_done_counter = self._restorer.counter
        self.pools = {PoolName.KV: self._pages}
        self._ledger = Ledger(self.page_size, geometry.page_bytes)
        self._control = ControlEndpoint(settings.control_address, self._standing, self.stat)
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
        self._catalog = Catalog(database, self._engine, settings.heartbeat_interval_s, self._ledger.saved)
        logger.info(
            "agentstate: rank %d, pages of %d tokens and %s bytes in %s (%d stored), database %s, control %s",
            rank,
            self.page_size,
            f"{geometry.page_bytes:,}",
            directory,
            self._store.stats.pages,
            database.url,
            self._control.address,
        )

    def retire(self, reason: str) -> None:
        """Restore and spill nothing from now on, because this engine's pages are no longer its fingerprint's."""
        if not self._retired:
            logger.warning("agentstate: this engine neither stores nor restores pages any more: %s", reason)
        self._retired = True

    # What the radix cache asks for, in the order of a request's life.

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Every restorable prefix length, in pages: full attention restores any prefix of what is stored."""
        stored = 0 if self._retired else self._store.prefix_length(_keys(transfers[0]))
        return list(range(1, stored + 1))

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        if self._retired:
            return False
        (transfer,) = transfers
        self._restorer.queue(rid, _keys(transfer), self._pages.page_numbers(transfer.device_indices))
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        return self._restorer.cancel(rid)

    def start_layer_wise_loading(self) -> int:
        return self._restorer.start(self._device_events())

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        return not self.failed_loads(counter_index)

    def failed_loads(self, counter_index: int) -> set[str]:
        """Wait like `finish_layer_wise_loading`, and tell which requests failed instead of whether one did."""
        return self._restorer.finish(counter_index)

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        if self._retired:
            return False
        (transfer,) = transfers
        numbers = self._pages.page_numbers(transfer.device_indices)
        self._spiller.offer(_keys(transfer), numbers, self._device_events())
        return True

    def num_completed_offloads(self) -> int:
        return len(self._spiller.results)

    def pop_completed_offload(self) -> bool:
        return self._spiller.results.popleft()

    def request_finished(self, session_id: str, key: RadixKey) -> None:
        """A request of a session has ended with the tokens of ``key`` in the tree: publish its manifest as soon as
        its pages are. Its keys are computed on the spilling thread, not the scheduler's."""
        if self._retired:
            return
        request = self._ledger.finished(session_id)

        def settle() -> None:
            keys = [bytes.fromhex(text) for text in get_storage_hash_str(key, page_size=self.page_size)]
            durable = self._store.prefix_length(keys)
            self._ledger.settled(session_id, request, keys, durable)
            self._catalog.save(self._manifest(session_id, keys[:durable]))

        self._spiller.then(settle)

    def reset(self) -> None:
        """Quiesce for a flush of the device cache. What is stored stays stored."""
        self._restorer.reset()
        self._spiller.drain()
        self._spiller.results.clear()

    def close(self) -> None:
        self._control.close()
        self._spiller.close()
        self._restorer.close()
        self._catalog.close()
        self._store.close()

    # What the control endpoint asks for.

    def stat(self) -> dict[str, Any]:
        return {
            "engine": self._engine.id,
            "rank": self._engine.rank,
            "model": self._engine.model,
            "fingerprint": self._engine.fingerprint,
            "retired": self._retired,
            "store": dataclasses.asdict(self._store.stats),
            "spill": {**dataclasses.asdict(self._spiller.stats), "waiting": self._spiller.waiting},
            "restore": dataclasses.asdict(self._restorer.stats),
        }

    def _standing(self, session_id: str) -> dict[str, Any]:
        standing = self._ledger.standing(session_id)
        if standing is None and (manifest := self._catalog.load(session_id)) is not None:
            return self._ledger.remembered(manifest, self._store.prefix_length(manifest.page_keys()))
        return standing or {"state": "unknown", "tokens": 0, "pages": 0, "bytes": 0}

    def _device_events(self) -> Sequence[torch.cuda.Event]:
        """After these, everything that was launched so far has read and written its device pages. A CPU launches
        nothing: its forwards are over when they return."""
        return self.record_offload_ready() if self._pages.device.type == "cuda" else ()

    def _manifest(self, session_id: str, keys: list[bytes]) -> Manifest:
        return Manifest(
            session_id=session_id,
            fingerprint=self._engine.fingerprint,
            rank=self._engine.rank,
            node=self._engine.node,
            engine_id=self._engine.id,
            page_size=self.page_size,
            tokens=len(keys) * self.page_size,
            keys=b"".join(keys),
            nbytes=len(keys) * self._pages.geometry.page_bytes,
        )


def _keys(transfer: PoolTransfer) -> list[bytes]:
    return [bytes.fromhex(key) for key in transfer.keys]


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host


def _kv_tensors(pool: Any) -> list[tuple[torch.Tensor, ...]]:
    """The tensors of every layer of a full-attention pool: (K, V), or (latent,) for MLA.

    A list of what is known, not of what is not: a pool with a scale, a sidecar or rows of another meaning would be
    stored without them, and every checksum of that would be right. Raises EngineError for any other pool.
    """
    layers: list[tuple[torch.Tensor, ...]] = []
    if type(pool) is MHATokenToKVPool and pool.kv_cache_layout == "nhd" and pool.k_scale_buffer is None:
        layers = list(zip(pool.k_buffer, pool.v_buffer, strict=True))
    elif type(pool) is MLATokenToKVPool:
        layers = [(tensor,) for tensor in pool.kv_buffer]
    rows = pool.size + pool.page_size
    if not layers or any(tensor.shape[0] != rows for layer in layers for tensor in layer):
        raise EngineError(
            f"AgentState does not store the KV of a {type(pool).__name__} yet: "
            "start without --radix-cache-backend agentstate"
        )
    return layers


def _fingerprint(page_size: int, kv_dtype: str, rows: list[list[int]], layers: int) -> bytes:
    """``rows`` are the shapes of a token's components in a layer: (heads, head size) of K and of V."""
    model, parallel = get_model(), get_parallel()
    return fingerprint(
        sglang=SUPPORTED,
        weights=weights_digest(_checkpoint(model.model_path, model.revision)),
        loader=str(model.model_loader_extra_config),
        quantization_params=str(model.quantization_param_path),
        rl_quantization=str(model.rl_quant_profile),
        model_overrides=str(model.json_model_override_args),
        dtype=str(model.dtype),
        quantization=str(model.quantization),
        kv_dtype=kv_dtype,
        rows=rows,
        layers=layers,
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
