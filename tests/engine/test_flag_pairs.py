"""Every two flags of the table that are tested or refused, together, as SGLang reads a command line and resolves it:
each has its class, each that is refused one sentence, and nothing ends in a traceback."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from sglang.srt import server_args
from sglang.srt.arg_groups import resolution_hooks
from sglang.srt.server_args import ServerArgs

from engine_patch import flag_report, flags, resolution
from engine_patch import sglang_api as sgl
from engine_patch.flags import REFUSED, TESTED, Standing

TLRU = '{"threshold": 4096, "next_prompt_estimate": 64}'
# Given where any value is tested or refused, and SGLang takes not just any.
VALUES = {
    "page_size": 16,
    "chunked_prefill_size": 1024,
    "unified_cache_external_linker_config": '{"a": 1}',
    "speculative_ngram_max_bfs_breadth": 1,
    "max_loaded_loras": 9,
    "radix_eviction_policy_config": TLRU,
    "lora_drain_wait_threshold": 1,
    "disaggregation_decode_host_receive_threshold": 0.5,
}
# Given beside a value: SGLang verifies trees of drafts only in pages of one token, and asks what adapters there may be.
BESIDE = {
    ("speculative_algorithm", "NGRAM"): ["--speculative-ngram-max-bfs-breadth", "1"],
    ("radix_eviction_policy", "tlru"): ["--radix-eviction-policy-config", TLRU],
    ("attn_dp_size", 2): ["--tp-size", "2"],
    ("enable_dp_attention", True): ["--tp-size", "2"],
    ("enable_lora", True): ["--max-lora-rank", "8", "--lora-target-modules", "q_proj"],
}
# SGLang itself refuses these together.
APART = [
    ({"--enable-lora", "--lora-paths"}, {"STANDALONE"}),
    ({"--dp-size"}, {"--attn-dp-size"}),
    ({"--attn-dp-size", "--enable-dp-attention"}, {"NGRAM", "STANDALONE"}),
    ({"decode"}, {"NGRAM", "STANDALONE"}),
]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 8192,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "torch_dtype": "float32",
    "vocab_size": 1024,
}


# Neither changes within a process, and both take longer than all the rest of a pair.
judge_version_once = functools.cache(resolution.judge_version)
record_fields_once = functools.cache(sgl.record_fields)


class Given(NamedTuple):
    field: str
    words: list[str]
    standing: Standing


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """SGLang's, made once: that takes longer than it takes to read a command line."""
    sgl.add_attention_backend_choices([flags.CPU_ATTENTION])
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser


def ways(parser: argparse.ArgumentParser, field: str, values: Any, standing: Standing) -> Iterator[Given]:
    """How a field is given: with each of ``values``, or with any but its default where there are none."""
    (action,) = (action for action in parser._actions if flags.spelling(field) in action.option_strings)
    if action.nargs == 0:
        yield Given(field, [flags.spelling(field), *BESIDE.get((field, True), [])], standing)
        return
    if values is None:
        choices = [choice for choice in action.choices or () if choice != sgl.flag_defaults(ServerArgs)[field]]
        values = [VALUES.get(field) or next(iter(choices), 2 if action.type is int else "given")]
    for value in sorted(values, key=str):
        words = [flags.spelling(field), str(value), *BESIDE.get((field, value), [])]
        yield Given(field, words, standing)


@pytest.fixture(scope="module")
def every(parser: argparse.ArgumentParser) -> list[Given]:
    """Each flag of the table with each of its values; that of AgentState itself is always there."""
    tables = ((TESTED, Standing.TESTED), (REFUSED, Standing.REFUSED))
    rows = [(field, row.values, standing) for table, standing in tables for field, row in table.items()]
    return [way for row in rows if row[0] != "radix_cache_backend" for way in ways(parser, *row)]


@pytest.fixture
def read(
    tmp_path: Path, parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], ServerArgs]:
    """What SGLang makes of a command line, before it resolves it, with the plug-in in its resolution."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setattr(server_args, "argparse", SimpleNamespace(ArgumentParser=lambda **_: parser))
    monkeypatch.setattr(ServerArgs, "add_cli_args", lambda _: None)
    monkeypatch.setattr(resolution, "judge_version", judge_version_once)
    monkeypatch.setattr(sgl, "record_fields", record_fields_once)
    monkeypatch.setattr(resolution_hooks, "_HOOKS", {})
    sgl.register_resolution_hook("handle_deprecated_dp_attention")(resolution.judge_flags)
    sgl.register_resolution_hook("handle_pd_disaggregation")(resolution.prepare_disaggregation)
    sgl.register_resolution_hook("handle_mxfp8_kv_cache_compatibility")(resolution.choose_page_size)
    sgl.register_resolution_hook("handle_hicache")(resolution.complete)
    sgl.register_resolution_hook("validate_deepep_v2_dispatch_token_budget")(resolution.conclude)
    ours = ["--model-path", str(tmp_path), "--radix-cache-backend", flags.BACKEND, "--device", "cpu"]
    return lambda words: sgl.parse_arguments([*ours, *words])


@contextmanager
def own_environment() -> Iterator[None]:
    """Resolving leaves variables for the engine's processes."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def pairs(every: list[Given]) -> Iterator[tuple[Given, Given]]:
    return ((one, other) for one, other in itertools.combinations(every, 2) if one.field != other.field)


def test_every_flag_of_the_table_is_checked_by_itself(every: list[Given], capsys: pytest.CaptureFixture[str]) -> None:
    for one in every:
        code = flag_report.main(["--model-path", "some/model", *one.words])
        said = " ".join(capsys.readouterr().out.split())
        assert one.words[0] in said and one.standing.value in said
        assert (code, "does not go with" in said) == ((1, True) if one.standing is Standing.REFUSED else (0, False))


def test_two_tested_flags_go_together_in_sglang_too(read: Any, every: list[Given]) -> None:
    tested = [one for one in every if one.standing is Standing.TESTED]
    found = 0
    for one, other in pairs(tested):
        given = {*one.words, *other.words}
        if any(given & some and given & others for some, others in APART):
            continue
        with own_environment():
            arguments = read(one.words + other.words)
            arguments.resolve_once()
        resolved = sgl.resolving_view(arguments)
        assert resolved.enable_unified_cache_external_linker, (one, other)
        assert resolved.page_size == (16 if "page_size" in (one.field, other.field) else 64), (one, other)
        found += 1
    assert found > 100


def test_a_refused_flag_is_refused_beside_any_other(read: Any, every: list[Given]) -> None:
    found = 0
    for one, other in pairs(every):
        refused = [given for given in (one, other) if given.standing is Standing.REFUSED]
        if refused:
            with own_environment(), pytest.raises(resolution.FlagRefused) as error:
                read(one.words + other.words).resolve_once()
            lines = str(error.value).splitlines()
            assert {line.split()[0] for line in lines} == {given.words[0] for given in refused}, (one, other)
            assert len(lines) == len(refused)
            assert all("does not go with --radix-cache-backend agentstate: " in line for line in lines)
            found += 1
    assert found > 1500
