"""What the plug-in does while SGLang resolves its arguments: it judges the flags that were given, completes the one
flag that turns AgentState on, and chooses a page size if nobody has."""

from __future__ import annotations

import logging
import os
from typing import Any

from engine_patch import contract, flags, versions

logger = logging.getLogger(__name__)

PAGE_SIZE = 64
# These attention backends read one token a page.
_ONE_TOKEN_A_PAGE = {"minicpm_flashattn", "minicpm_flashinfer"}
_LINKER = {
    "unified_cache_external_linker_backend": "dynamic",
    "unified_cache_external_linker_config": {
        "linker": "AgentStateLinker",
        "linker_module_path": "engine_patch.linker",
    },
}
# What this module itself declares.
_OURS = {"enable_unified_cache_external_linker", *_LINKER}


class FlagRefused(SystemExit, ValueError):
    """A flag, or a version of SGLang, that AgentState does not support. A launcher that does not catch it prints the
    sentence alone and exits with code 1; a program that starts engines can catch it as a ValueError."""


def judge_flags(server_args: Any, previous: Any) -> None:
    """Refuse, warn and log, each in one line, before anything is resolved. Raises FlagRefused."""
    from engine_patch import sglang_api as sgl

    if server_args.radix_cache_backend == flags.BACKEND:
        judge_version(ours=sgl.is_our_platform())
        given = sgl.given_flags(server_args)
        if (refusal := flags.refusal(given)) is not None:
            raise FlagRefused(refusal)
        if (untested := flags.untested(given)) is not None:
            logger.warning("agentstate: %s", untested)
        tested = [flags.shown(flag) for flag in given if flag.standing is flags.Standing.TESTED]
        logger.info("agentstate: tested flags: %s", ", ".join(tested))
    previous(server_args)


def judge_version(*, ours: bool) -> None:
    """Refuse a version of SGLang that lacks what is needed, by what it has and not by its number, and warn of one that
    is not tested. ``ours`` is whether the engine runs on our CPU platform. Raises FlagRefused."""
    found = versions.installed()
    lacks = contract.missing(contract.ENGINE) + (contract.missing(contract.CPU) if ours else [])
    if lacks:
        raise FlagRefused(versions.refusal(found, lacks))
    if (warning := versions.warning(found)) is not None:
        logger.warning("agentstate: %s", warning)


def refuse_resolved(server_args: Any, *, but: set[str] = _OURS) -> None:
    """Refuse what a model or another flag has turned on, like what was given. Raises FlagRefused."""
    from engine_patch import sglang_api as sgl

    cfg = sgl.resolving_view(server_args)
    defaults = sgl.flag_defaults(server_args)
    resolved = {field: getattr(cfg, field) for field in flags.REFUSED if field in defaults and field not in but}
    judged = [flags.judge(field, value) for field, value in resolved.items() if value != defaults[field]]
    if (refusal := flags.refusal(judged)) is not None:
        raise FlagRefused(refusal)


def prepare_disaggregation(server_args: Any, previous: Any) -> None:
    """Where prefill and decode are apart, have the engine that decodes keep a radix tree, out of which pages are
    stored: SGLang's default is none. Have the two tell each other which DP rank prefills a request: the turn's token
    may name another one than SGLang concludes from the request's room, and it fails such a request."""
    from engine_patch import sglang_api as sgl

    cfg = sgl.resolving_view(server_args)
    if cfg.radix_cache_backend == flags.BACKEND and cfg.disaggregation_mode != "null":
        os.environ.setdefault("SGLANG_DISAGGREGATION_FORCE_QUERY_PREFILL_DP_RANK", "1")
        if cfg.disaggregation_mode == "decode":
            sgl.declare_resolution(server_args, "agentstate", disaggregation_decode_enable_radix_cache=True)
    previous(server_args)


def complete(server_args: Any, previous: Any) -> None:
    """Turn on SGLang's external linker, with ours, and have the warm-up run."""
    from engine_patch import sglang_api as sgl
    from engine_patch import warm_up

    cfg = sgl.resolving_view(server_args)
    if cfg.radix_cache_backend != flags.BACKEND:
        previous(server_args)
        return
    refuse_resolved(server_args, but=set())
    previous(server_args)
    warm_ups = [*filter(None, (cfg.warmups or "").split(",")), *([] if cfg.skip_server_warmup else [warm_up.NAME])]
    sgl.declare_resolution(
        server_args,
        "agentstate",
        warmups=",".join(warm_ups) or None,
        enable_unified_cache_external_linker=True,
        **(_LINKER if sgl.constructs_linkers() else {}),
    )


def choose_page_size(server_args: Any, previous: Any) -> None:
    """Replace SGLang's default of one token a page. Called right before that applies: whoever needs another size has
    set it by then."""
    from engine_patch import sglang_api as sgl

    previous(server_args)
    cfg = sgl.resolving_view(server_args)
    ours = cfg.radix_cache_backend == flags.BACKEND
    # An engine of our CPU platform is measured beside one with AgentState: both have pages of one size.
    if cfg.page_size is None and (ours or sgl.is_our_platform()) and _allows(cfg, sgl.platform_is_hip()):
        sgl.declare_resolution(server_args, "agentstate", page_size=PAGE_SIZE)
        logger.info("agentstate: --page-size is not given: pages of %d tokens", PAGE_SIZE)


def _allows(cfg: Any, is_hip: bool) -> bool:
    """Whether pages of 64 tokens go with everything else. If that is unknown, SGLang's default stays."""
    if cfg.device not in ("cuda", "cpu") or is_hip:
        return False
    if cfg.uses_mamba_radix_cache and (
        cfg.mamba_radix_cache_strategy == "no_buffer" or cfg.mamba_track_interval % PAGE_SIZE
    ):
        return False
    if cfg.speculative_algorithm == "NGRAM" and cfg.speculative_ngram_max_bfs_breadth > 1:
        # SGLang verifies its trees in such pages with one attention backend only, and refuses the others.
        return False
    backends = {cfg.attention_backend, cfg.prefill_attention_backend, cfg.decode_attention_backend}
    chunk = cfg.chunked_prefill_size or 0
    return not backends & _ONE_TOKEN_A_PAGE and (chunk <= 0 or chunk % PAGE_SIZE == 0)


def conclude(server_args: Any, previous: Any) -> None:
    """After everything is resolved, refuse what was turned on since, and warn of what pages of one token cost."""
    from engine_patch import sglang_api as sgl

    previous(server_args)
    cfg = sgl.resolving_view(server_args)
    if cfg.radix_cache_backend != flags.BACKEND:
        return
    refuse_resolved(server_args)
    if cfg.page_size == 1:
        logger.warning(
            "agentstate: pages of one token: each is hashed, stored and looked up by itself, which takes CPU time and "
            "room on disk; --page-size 64 takes a fraction of both where the model allows it"
        )
