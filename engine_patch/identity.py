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
    """The fingerprint of each pool on each rank, 32 bytes. That of `PoolName.KV` stands for all pools and exists
    without them too. Reads samples of the checkpoint. Raises SettingsError if it has no weights."""
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
    """What a page of any of ``pools`` is valid for. The fields cover all pools, since each is computed from the others.

    These fields are always there. Add later ones to `_further_fields`: here they would make every stored page
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
    """The optional fields. Each is there only when it is not at its default, so that stored pages stay reachable when
    a field is added."""
    code = sorted(checkpoint.glob("*.py")) if model.trust_remote_code and checkpoint.is_dir() else ()
    further = {
        # Nobody knows whether a flag that was never run with AgentState leaves KV the same.
        "flags": dict(flags.marks(given_flags(server_args))),
        "code": [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in code],
    }
    return {name: value for name, value in further.items() if value}


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
