from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from engine_patch import contract, resolution, versions
from engine_patch import sglang_api as sgl


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is declared, and whether SGLang's own step was taken, when these arguments are given."""

    def run(**given: Any) -> tuple[dict[str, Any], bool]:
        declared: dict[str, Any] = {}
        stock: list[Any] = []
        monkeypatch.setattr(sgl, "declare_resolution", lambda arguments, source, **fields: declared.update(fields))
        arguments = ServerArgs(model_path="m", **{"radix_cache_backend": "agentstate", **given})
        resolution.complete(arguments, stock.append)
        return declared, bool(stock)

    return run


def test_one_flag_turns_everything_on(complete: Any) -> None:
    declared, stock = complete()
    assert stock
    assert declared["enable_unified_cache_external_linker"] is True
    assert declared["unified_cache_external_linker_config"]["linker"] == "AgentStateLinker"
    assert declared["warmups"] == "agentstate"
    assert complete(warmups="their_own")[0]["warmups"] == "their_own,agentstate"
    assert complete(skip_server_warmup=True)[0]["warmups"] is None


def test_no_linker_is_named_to_an_sglang_that_constructs_none(complete: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sgl, "constructs_linkers", lambda: False)
    declared, _ = complete()
    assert declared == {"warmups": "agentstate", "enable_unified_cache_external_linker": True}


@pytest.mark.parametrize("ours", [True, False])
def test_a_version_is_refused_by_what_it_lacks(monkeypatch: pytest.MonkeyPatch, ours: bool) -> None:
    lacks = {id(contract.ENGINE): ["a", "b"], id(contract.CPU): ["c", "d"]}
    monkeypatch.setattr(contract, "missing", lambda part: lacks[id(part)])
    monkeypatch.setattr(versions, "installed", lambda: versions.PINNED)
    found = "a; b; c; and 1 more" if ours else "a; b"
    with pytest.raises(resolution.FlagRefused, match=rf"SGLang \S+, which lacks: {found}\. .* pip install sglang=="):
        resolution.judge_version(ours=ours)


def test_an_untested_version_that_lacks_nothing_starts_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for version in (*versions.TESTED, "9.9.9"):
        monkeypatch.setattr(versions, "installed", lambda version=version: version)
        resolution.judge_version(ours=False)
    (record,) = caplog.records
    assert record.getMessage().startswith("agentstate: SGLang 9.9.9 is not tested with AgentState")


def test_the_version_is_judged_before_flags_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "missing", lambda part: ["something"])
    resolved: list[Any] = []
    resolution.judge_flags(ServerArgs(model_path="m"), resolved.append)
    assert len(resolved) == 1
    with pytest.raises(resolution.FlagRefused, match="which lacks: something"):
        resolution.judge_flags(ServerArgs(model_path="m", radix_cache_backend="agentstate", pp_size=2), resolved.append)
    assert len(resolved) == 1


def test_without_the_flag_nothing_changes(complete: Any) -> None:
    assert complete(radix_cache_backend="default", enable_hierarchical_cache=True) == ({}, True)


PLAIN = {
    "radix_cache_backend": "agentstate",
    "device": "cuda",
    "page_size": None,
    "uses_mamba_radix_cache": False,
    "mamba_radix_cache_strategy": "auto",
    "mamba_track_interval": 256,
    "attention_backend": "fa3",
    "prefill_attention_backend": None,
    "decode_attention_backend": None,
    "chunked_prefill_size": 8192,
    "speculative_algorithm": None,
    "speculative_ngram_max_bfs_breadth": 10,
}


@pytest.fixture
def page_size(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page size that is declared when resolution has come so far; None where SGLang's default stays."""

    def run(*, hip: bool = False, our_platform: bool = False, forced: int | None = None, **given: Any) -> int | None:
        arguments = SimpleNamespace(**{**PLAIN, **given})
        declared: dict[str, Any] = {}
        monkeypatch.setattr(sgl, "platform_is_hip", lambda: hip)
        monkeypatch.setattr(sgl, "is_our_platform", lambda: our_platform)
        monkeypatch.setattr(sgl, "declare_resolution", lambda arguments, source, **fields: declared.update(fields))

        def previous(arguments: Any) -> None:
            arguments.page_size = forced or arguments.page_size

        resolution.choose_page_size(arguments, previous)
        return declared.get("page_size")

    return run


def test_where_nobody_says_pages_have_64_tokens_and_the_log_says_so(
    page_size: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "engine_patch.resolution")
    assert page_size() == 64
    assert [record.getMessage() for record in caplog.records] == [
        "agentstate: --page-size is not given: pages of 64 tokens"
    ]
    assert page_size(device="cpu") == 64
    assert page_size(uses_mamba_radix_cache=True, mamba_radix_cache_strategy="extra_buffer") == 64
    assert page_size(chunked_prefill_size=-1) == 64
    assert page_size(speculative_algorithm="EAGLE") == 64
    assert page_size(speculative_algorithm="NGRAM", speculative_ngram_max_bfs_breadth=1) == 64
    assert page_size(radix_cache_backend=None, our_platform=True, device="cpu") == 64


@pytest.mark.parametrize(
    "given",
    [
        {"page_size": 1},
        {"page_size": 16},
        {"forced": 128},
        {"radix_cache_backend": None},
        {"device": "npu"},
        {"hip": True},
        {"uses_mamba_radix_cache": True, "mamba_radix_cache_strategy": "no_buffer"},
        {"uses_mamba_radix_cache": True, "mamba_radix_cache_strategy": "extra_buffer", "mamba_track_interval": 100},
        {"attention_backend": "minicpm_flashattn"},
        {"chunked_prefill_size": 1000},
        {"speculative_algorithm": "NGRAM"},
    ],
    ids=str,
)
def test_what_the_user_a_model_or_its_attention_says_stays(page_size: Any, given: dict[str, Any]) -> None:
    assert page_size(**given) is None


@pytest.mark.parametrize(("size", "backend", "warned"), [(1, "agentstate", 1), (64, "agentstate", 0), (1, None, 0)])
def test_pages_of_one_token_are_warned_of(
    caplog: pytest.LogCaptureFixture, size: int, backend: str | None, warned: int
) -> None:
    arguments = ServerArgs(model_path="m", page_size=size, radix_cache_backend=backend)
    resolution.conclude(arguments, lambda arguments: None)
    assert len([record for record in caplog.records if "pages of one token" in record.getMessage()]) == warned


def test_what_was_turned_on_after_the_linker_is_refused_in_the_end() -> None:
    arguments = ServerArgs(model_path="m", radix_cache_backend="agentstate")
    resolution.conclude(arguments, lambda arguments: sgl.declare_resolution(arguments, "a model", page_size=64))
    with pytest.raises(resolution.FlagRefused, match="^--speculative-algorithm DFLASH "):
        resolution.conclude(
            arguments, lambda arguments: sgl.declare_resolution(arguments, "a model", speculative_algorithm="DFLASH")
        )
