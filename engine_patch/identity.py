"""What a rank is: which model its pages are valid for, how much of them it may keep, and how others find it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentstate import ids
from agentstate.errors import SettingsError
from agentstate.fleet.engines import Engine
from agentstate.pages import Quota, Space, configuration, fingerprint, tensor_names, weights_digest
from agentstate.settings import Settings
from engine_patch import flags
from engine_patch.pools import DevicePool
from engine_patch.sglang_api import SUPPORTED, PoolName, get_model, get_parallel, get_serving, given_flags


def space(settings: Settings, marks: Sequence[Mapping[PoolName, bytes]]) -> Space:
    """The room that all pools of this rank share, given the `fingerprints` of every rank."""
    parallel = get_parallel()
    quota = None if settings.pages_quota is None else settings.pages_quota // parallel.tp_size
    return Space(
        Quota(quota, settings.pages_free_fraction),
        settings.pages_path.absolute(),
        kin=[store_directory(settings, mark, rank) for rank, own in enumerate(marks) for mark in own.values()],
        rank=parallel.tp_rank,
        ranks=parallel.tp_size,
    )


def fingerprints(server_args: Any, page_size: int, pools: Sequence[DevicePool]) -> list[dict[PoolName, bytes]]:
    """What a page of each pool is valid for, 32 bytes, on each rank; that of `PoolName.KV` stands for all pools and is
    there without them too. Reads samples of the checkpoint. Raises SettingsError where it has no weights."""
    fields = _fields(server_args, page_size, pools)
    names = {PoolName.KV, *(pool.name for pool in pools)}
    ranks = range(get_parallel().tp_size)
    return [{name: fingerprint(**fields, rank=rank, pool=name.value) for name in names} for rank in ranks]


def store_directory(settings: Settings, mark: bytes, rank: int) -> Path:
    """Where a rank's store of the fingerprint ``mark`` is."""
    return settings.pages_path.absolute() / mark.hex()[:32] / f"rank{rank}"


def engine(
    settings: Settings, server_args: Any, node: str, mark: bytes, *, control_address: str, control_secret: str
) -> Engine:
    """This rank as SQL knows it, under an id of its own. ``node`` is the id of its pages' directory."""
    return Engine(
        id=ids.new("eng"),
        node=node,
        rank=get_parallel().tp_rank,
        control_address=control_address,
        base_url=settings.engine_base_url or f"http://{_reachable(server_args.host)}:{server_args.port}/v1",
        model=get_serving().served_model_name or get_model().model_path,
        fingerprint=mark.hex(),
        pages_dir=str(settings.pages_path.absolute()),
        control_secret=control_secret,
    )


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host


def _fields(server_args: Any, page_size: int, pools: Sequence[DevicePool]) -> dict[str, Any]:
    """What a page of any of ``pools`` is valid for: of all of them, since each is computed from the others.

    These fields are always there. Whatever is added later belongs to `_further_fields`, or every stored page would be
    unreachable after an upgrade. The version of SGLang counts, since its kernels may lay out KV in another way.
    """
    model, parallel = get_model(), get_parallel()
    checkpoint = checkpoint_of(model)
    always = dict(
        sglang=SUPPORTED,
        weights=weights_digest(checkpoint),
        loader=[str(model.load_format or "auto"), str(model.model_loader_extra_config)],
        quantization_params=_digest_of(model.quantization_param_path),
        rl_quantization=str(model.rl_quant_profile),
        model_overrides=str(model.json_model_override_args),
        dtype=str(model.dtype),
        quantization=str(model.quantization),
        pools=[pool.layout() for pool in pools],
        page_size=page_size,
        tp_size=parallel.tp_size,
        pp_size=parallel.pp_size,
    )
    return always | _further_fields(server_args, model, checkpoint)


def _further_fields(server_args: Any, model: Any, checkpoint: Path) -> dict[str, Any]:
    """What a page is valid for beside what is always there: each only where it is not at its default, so that pages
    which are stored stay reachable when one is added."""
    code = sorted(checkpoint.glob("*.py")) if model.trust_remote_code and checkpoint.is_dir() else ()
    further = {
        # Of a flag that nobody has run with AgentState, nobody knows that KV is the same with it and without.
        "flags": dict(flags.marks(given_flags(server_args))),
        "code": [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in code],
    }
    return {name: value for name, value in further.items() if value}


def _digest_of(path: str | None) -> str:
    """The content of a file of parameters, wherever it lies; "None" without one. Raises SettingsError where it cannot
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
    """What a checkpoint must have in common with another one whose weights are loaded over its own: the running model
    is configured by the first, and keeps what the second lacks. ``tensors`` is empty where that cannot be told."""

    configuration: dict[str, bytes]
    tensors: frozenset[str]


def shape() -> Shape:
    """That of the checkpoint that is loaded, as its files are now. Raises SettingsError where one is damaged."""
    checkpoint = checkpoint_of(get_model())
    return Shape(configuration(checkpoint), frozenset(tensor_names(checkpoint)))


def in_the_way(before: Shape, now: Shape) -> str | None:
    """Why pages of an engine that has loaded ``now`` over ``before`` need not be those of an engine that is started
    with ``now``; None when they are."""
    model = get_model()
    if model.quantization is not None:
        return "its quantized weights were updated in place"
    if model.load_format not in (None, "auto", "safetensors"):
        return f"its weights were updated with the load format {model.load_format}"
    if not now.tensors or before != now:
        return f"its weights were updated from {model.model_path}, which has another configuration or other tensors"
    return None


def checkpoint_of(model: Any) -> Path:
    """Where the weights are: the model's path itself, or where the hub's cache keeps that model."""
    if Path(model.model_path).exists():
        return Path(model.model_path)
    from huggingface_hub import snapshot_download

    found = snapshot_download(
        model.model_path, revision=model.revision, cache_dir=model.download_dir, local_files_only=True
    )
    return Path(found)
