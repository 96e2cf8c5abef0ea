"""What a rank is: which model its pages are valid for, how much of them it may keep, and how others find it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentstate import ids
from agentstate.errors import SettingsError
from agentstate.fleet.engines import Engine, Phase
from agentstate.pages import Quota, Space, configuration, fingerprint, stores_beside, tensor_names, weights_digest
from agentstate.pages.node import dp_roots, of_dp_rank
from agentstate.settings import Settings
from engine_patch import flags, replicas, versions
from engine_patch.pools import DevicePool
from engine_patch.sglang_api import (
    PoolName,
    generates,
    get_disagg,
    get_lora,
    get_model,
    get_parallel,
    get_serving,
    get_spec,
    given_flags,
)


@dataclass(frozen=True)
class DpRank:
    """Which one of ``size`` DP ranks this process belongs to. Each is an engine of its own but for the server before
    it: it serves requests of its own, from a radix tree and stores of its own, which lie below its ``root``."""

    number: int
    size: int

    def root(self, settings: Settings) -> Path:
        return of_dp_rank(settings.pages_path.absolute(), self.number)

    def left(self, settings: Settings) -> list[Path]:
        """The roots that this one looks after of those that were left when there were more DP ranks."""
        roots = dp_roots(settings.pages_path.absolute())
        return [root for number, root in roots.items() if number >= self.size and number % self.size == self.number]


def dp_rank() -> DpRank:
    """That of this process. SGLang's attention data parallelism makes DP ranks of one group of ranks; without it, they
    are replicas. The two do not go together."""
    parallel = get_parallel()
    if parallel.attn_dp_size > 1:
        return DpRank(parallel.attn_dp_rank, parallel.attn_dp_size)
    return DpRank(parallel.dp_rank or 0, parallel.dp_size)


@dataclass(frozen=True)
class Group:
    """The ``size`` ranks of this machine, ``rank`` among them, that hold the same pages: their first one, the
    ``writer``, stores these for all. The engine, or its DP rank, has ``ranks`` of them in all, in ``writers`` groups.
    """

    size: int
    rank: int
    ranks: int

    @property
    def writer(self) -> int:
        return self.of(self.rank)

    @property
    def writes(self) -> bool:
        """Whether this rank is the writer."""
        return self.writer == self.rank

    @property
    def writers(self) -> int:
        return self.ranks // self.size

    def of(self, rank: int) -> int:
        """The writer for a rank."""
        return rank - rank % self.size


def group(server_args: Any, pools: Sequence[DevicePool]) -> Group:
    """The group that this rank belongs to."""
    parallel = get_parallel()
    of_machine = parallel.tp_size // max(1, getattr(server_args, "nnodes", 1))
    size = replicas.group(pools, math.gcd(parallel.attn_tp_size, of_machine))
    return Group(size, parallel.attn_tp_rank, parallel.attn_tp_size)


def space(settings: Settings, marks: Sequence[Mapping[PoolName, bytes]], of: Group) -> Space:
    """The room that all pools of this rank share, given the `fingerprints` of every rank."""
    dp = dp_rank()
    quota, writes = (
        None if of_all is None else of_all // (of.writers * dp.size)
        for of_all in (settings.pages_quota, settings.writes_per_day)
    )
    return Space(
        Quota(quota, settings.pages_free_fraction),
        dp.root(settings),
        kin=[path for rank in range(len(marks)) if of.of(rank) == rank for path in directories(settings, marks, rank)],
        left=dp.left(settings),
        rank=of.writer // of.size,
        ranks=of.writers,
        writes_per_day=writes,
    )


def directories(settings: Settings, marks: Sequence[Mapping[PoolName, bytes]], rank: int) -> list[Path]:
    """Where the stores of a rank are that writes its own, given the `fingerprints` of every rank."""
    return [store_directory(settings, mark, rank) for mark in marks[rank].values()]


def fingerprints(server_args: Any, page_size: int, pools: Sequence[DevicePool]) -> list[dict[PoolName, bytes]]:
    """The fingerprint, 32 bytes, of each pool of each rank that writes its own pages. That of `PoolName.KV` stands for
    all pools and exists without them too. Reads samples of the checkpoint. Raises SettingsError if it has no
    weights."""
    fields = _fields(server_args, page_size, pools)
    names = {PoolName.KV, *(pool.name for pool in pools)}
    ranks = range(get_parallel().attn_tp_size)
    return [{name: fingerprint(**fields, rank=rank, pool=name.value) for name in names} for rank in ranks]


def store_directory(settings: Settings, mark: bytes, rank: int) -> Path:
    """Where a rank's store of the fingerprint ``mark`` is, in its DP rank's root."""
    return dp_rank().root(settings) / mark.hex()[:32] / f"rank{rank}"


def reads_others(settings: Settings) -> bool:
    """Whether there may be `stores_of_others`."""
    return bool(settings.pages_siblings) or dp_rank().size > 1


def stores_of_others(settings: Settings, mark: bytes, rank: int) -> list[Path]:
    """Where the other DP ranks of this engine, and other engines of this machine, store the same pages."""
    return stores_beside(
        settings.pages_siblings, dp_rank().root(settings), mark, rank, engine=settings.pages_path.absolute()
    )


def engine(
    settings: Settings, server_args: Any, node: str, mark: bytes, *, control_address: str, control_secret: str
) -> Engine:
    """This rank as SQL knows it, under an id of its own. ``node`` is the id of its pages' directory, and ``mark`` the
    fingerprint of the full attention that it reads: its own, or that of the rank which writes for it."""
    dp = dp_rank()
    return Engine(
        id=ids.new("eng"),
        node=node,
        rank=get_parallel().attn_tp_rank,
        control_address=control_address,
        base_url=settings.engine_base_url or f"http://{_reachable(server_args.host)}:{server_args.port}/v1",
        model=get_serving().served_model_name or get_model().model_path,
        fingerprint=mark.hex(),
        pages_dir=str(dp.root(settings)),
        control_secret=control_secret,
        dp_rank=dp.number,
        dp_size=dp.size,
        phase=_PHASES.get(get_disagg().disaggregation_mode, Phase.BOTH),
    )


_PHASES = {"prefill": Phase.PREFILL, "decode": Phase.DECODE}


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host


def _fields(server_args: Any, page_size: int, pools: Sequence[DevicePool]) -> dict[str, Any]:
    """What a page of any of ``pools`` is valid for. The fields cover all pools, since each is computed from the others.

    These fields are always there. Add later ones to `_further_fields`: here they would make every stored page
    unreachable after an upgrade. Versions of SGLang count by the layout of their KV (`versions.layout`).
    """
    model, parallel = get_model(), get_parallel()
    checkpoint = checkpoint_of(model)
    always = dict(
        sglang=versions.layout(versions.installed(), _architecture(checkpoint)),
        weights=weights_digest(checkpoint),
        loader=[str(model.load_format or "auto"), str(model.model_loader_extra_config)],
        quantization_params=_digest_of(model.quantization_param_path),
        rl_quantization=str(model.rl_quant_profile),
        model_overrides=str(model.json_model_override_args),
        dtype=str(model.dtype),
        quantization=str(model.quantization),
        pools=[pool.layout() for pool in pools],
        page_size=page_size,
        # Those that share out the heads: what they compute is the same however many DP ranks are beside them.
        tp_size=parallel.attn_tp_size,
        pp_size=parallel.pp_size,
    )
    return always | _further_fields(server_args, model, checkpoint)


def _architecture(checkpoint: Path) -> str | None:
    """What a checkpoint's configuration says that its model is, None if it does not."""
    try:
        named = json.loads(configuration(checkpoint).get("config.json", b"{}")).get("architectures")
    except (ValueError, AttributeError):
        return None
    return str(named[0]) if isinstance(named, list) and len(named) == 1 else None


def _further_fields(server_args: Any, model: Any, checkpoint: Path) -> dict[str, Any]:
    """The optional fields. Each is there only when it is not at its default, so that stored pages stay reachable when
    a field is added."""
    code = sorted(checkpoint.glob("*.py")) if model.trust_remote_code and checkpoint.is_dir() else ()
    further = {
        # Nobody knows whether a flag that was never run with AgentState leaves KV the same.
        "flags": dict(flags.marks(given_flags(server_args))),
        "code": [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in code],
        "draft": _draft_fields(model),
        # Some models attend to what comes after as well, if they embed.
        "embeds": not generates([_architecture(checkpoint) or ""], server_args.is_embedding),
    }
    return {name: value for name, value in further.items() if value}


def has_draft_model() -> bool:
    """Whether the engine speculates with a draft model, which has KV of its own."""
    return get_spec().speculative_algorithm not in (None, "NGRAM")


def _draft_fields(model: Any) -> list[str]:
    """What a draft model's KV depends on; empty without one.

    These fields count for every pool. The target's KV is the same with any draft model, but a page without the draft
    model's part is of no use, and a manifest must not promise what another draft model has left out.
    """
    if not has_draft_model():
        return []
    spec = get_spec()
    path = spec.speculative_draft_model_path or model.model_path
    return [
        spec.speculative_algorithm,
        weights_digest(_checkpoint(path, spec.speculative_draft_model_revision, model.download_dir)),
        str(spec.speculative_draft_load_format),
        str(spec.speculative_draft_model_quantization),
    ]


def _digest_of(path: str | None) -> str:
    """The digest of a parameter file's content, wherever it lies; "None" without one. Raises SettingsError if it cannot
    be read."""
    if path is None:
        return str(path)
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise SettingsError(
            f"--quantization-param-path {path} cannot be read ({error.strerror}), and KV depends on it"
        ) from error


@dataclass(frozen=True)
class Shape:
    """What two checkpoints must have in common before one's weights are loaded over the other's: the running model is
    configured by the first, and keeps what the second lacks. ``tensors`` is empty if it cannot be told."""

    configuration: dict[str, bytes]
    tensors: frozenset[str]


def shape() -> Shape:
    """The shape of the loaded checkpoint, as its files are now. Raises SettingsError if one is damaged."""
    checkpoint = checkpoint_of(get_model())
    return Shape(configuration(checkpoint), frozenset(tensor_names(checkpoint)))


def in_the_way(before: Shape, now: Shape) -> str | None:
    """Why an engine that has loaded ``now`` over ``before`` may compute other pages than an engine started with
    ``now``; None if both compute the same."""
    model = get_model()
    if has_draft_model():
        return "weights were updated, and whether the draft model's were cannot be told"
    if get_lora().enable_lora:
        return "weights were updated below those of adapters, and whether all were cannot be told"
    if model.quantization is not None:
        return "its quantized weights were updated in place"
    if model.load_format not in (None, "auto", "safetensors"):
        return f"its weights were updated with the load format {model.load_format}"
    if not now.tensors or before != now:
        return f"its weights were updated from {model.model_path}, which has another configuration or other tensors"
    return None


def checkpoint_of(model: Any) -> Path:
    """Where the weights are: the model's path itself, or where the hub's cache keeps that model."""
    return _checkpoint(model.model_path, model.revision, model.download_dir)


def _checkpoint(path: str, revision: str | None, cache_dir: str | None) -> Path:
    if Path(path).exists():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, revision=revision, cache_dir=cache_dir, local_files_only=True))
