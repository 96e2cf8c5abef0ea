"""The table of flags against SGLang's own list of them, and against what the plug-in does at a start."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sglang.srt.arg_groups import resolution_hooks
from sglang.srt.server_args import ServerArgs

from engine_patch import flag_report, flags, resolution
from engine_patch import sglang_api as sgl
from engine_patch.flags import Standing, judge

ROOT = Path(__file__).parents[2]


def off_default(field: str) -> Any:
    """A value that turns a flag on."""
    default = sgl.flag_defaults(ServerArgs)[field]
    if isinstance(default, bool) or field == "enable_lora":
        return True
    return 2 if isinstance(default, int) else ["a"] if field == "lora_paths" else "given"


REFUSED = [
    (field, value)
    for field, refusal in flags.REFUSED.items()
    for value in (sorted(refusal.values) if refusal.values else [off_default(field)])
]


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's own resolution of a command that names no model, as the plug-in takes part in it."""
    monkeypatch.setattr(resolution_hooks, "_HOOKS", {})
    sgl.register_resolution_hook("handle_deprecated_dp_attention")(resolution.judge_flags)

    def run(**given: Any) -> ServerArgs:
        arguments = ServerArgs(model_path="dummy", **{"radix_cache_backend": "agentstate", **given})
        arguments.resolve_once()
        return arguments

    return run


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=lambda part: str(part))
def test_every_refused_flag_is_refused_with_its_sentence(resolve: Any, field: str, value: Any) -> None:
    refusal = flags.REFUSED[field]
    with pytest.raises(resolution.FlagRefused) as refused:
        resolve(**{field: value})
    (line,) = str(refused.value).splitlines()
    assert line.startswith(flags.spelling(field))
    assert line.endswith(f"does not go with --radix-cache-backend agentstate: {refusal.reason}; {refusal.instead}.")


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=lambda part: str(part))
def test_what_a_model_or_another_flag_turns_on_is_refused_as_well(
    monkeypatch: pytest.MonkeyPatch, field: str, value: Any
) -> None:
    arguments = ServerArgs(model_path="dummy", radix_cache_backend="agentstate")
    sgl.declare_resolution(arguments, "a model", **{field: value})
    if field in resolution._OURS:
        resolution.refuse_resolved(arguments)
    else:
        with pytest.raises(resolution.FlagRefused, match=f"^{flags.spelling(field)} "):
            resolution.refuse_resolved(arguments)


def test_each_of_several_refused_flags_has_a_line(resolve: Any) -> None:
    with pytest.raises(ValueError) as refused:
        resolve(pp_size=2, enable_lmcache=True, enable_metrics=True)
    assert [line.split()[0] for line in str(refused.value).splitlines()] == ["--pp-size", "--enable-lmcache"]


def test_a_refusal_that_nobody_catches_is_one_line_and_exit_code_1() -> None:
    program = "from engine_patch.resolution import FlagRefused\nraise FlagRefused('it does not go')"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, "it does not go\n")


def test_unknown_flags_are_named_in_one_warning_and_tested_ones_in_one_line(
    resolve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "engine_patch.resolution")
    resolve(enable_two_batch_overlap=True, attention_backend="fa3", max_total_tokens=4096, api_key="hunter2")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "--enable-two-batch-overlap" in warning and "--attention-backend fa3" in warning
    (tested,) = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert "--max-total-tokens 4096" in tested
    assert "hunter2" not in warning + tested


def test_without_agentstate_nothing_is_judged(resolve: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "engine_patch.resolution")
    assert resolve(radix_cache_backend=None, enable_lmcache=True).enable_lmcache
    assert not caplog.records


def test_every_flag_of_sglang_is_in_one_class_or_unknown() -> None:
    named = [
        *(field for fields in flags.NO_EFFECT.values() for field in fields.split()),
        *flags.IDENTITY.split(),
        *(field for fields in flags.INERT.values() for field in fields.split()),
        *(flags.TESTED.keys() | flags.REFUSED.keys()),
    ]
    assert {field: count for field, count in Counter(named).items() if count > 1} == {}
    fields = set(sgl.flag_defaults(ServerArgs))
    assert set(named) | set(flags.SAME_KV.split()) <= fields
    for field in flags.TESTED.keys() & flags.REFUSED.keys():
        tested, refused = flags.TESTED[field].values, flags.REFUSED[field].values
        assert tested is not None and refused is not None and not tested & refused
    assert {field for field in fields if not flags.known(field)} == {
        field for field in fields if judge(field, "some value").standing is Standing.UNKNOWN
    } - flags.TESTED.keys()


def test_the_owner_of_what_does_nothing_is_refused() -> None:
    assert flags.INERT.keys() <= flags.REFUSED.keys()


def test_a_flag_that_an_upgrade_brings_is_unknown_and_keeps_pages_apart() -> None:
    args = type("Newer", (msgspec.Struct,), {"__annotations__": {"kv_twist": int}, "kv_twist": 0})
    assert sgl.given_flags(args()) == []
    (flag,) = sgl.given_flags(args(kv_twist=3))
    assert flag.standing is Standing.UNKNOWN
    assert flags.marks([flag]) == {"kv_twist": "3"}


@pytest.mark.parametrize(
    ("field", "value", "standing"),
    [
        ("kv_cache_dtype", "fp8_e4m3", Standing.TESTED),
        ("kv_cache_dtype", "fp8_e5m2", Standing.UNKNOWN),
        ("kv_cache_dtype", "nvfp4", Standing.UNKNOWN),
        ("load_format", "safetensors", Standing.TESTED),
        ("load_format", "gguf", Standing.UNKNOWN),
        ("load_format", "remote_instance", Standing.REFUSED),
        ("attention_backend", "torch_native", Standing.TESTED),
        ("attention_backend", "fa3", Standing.UNKNOWN),
        ("enable_lora", False, Standing.TESTED),
        ("port", 1, Standing.TESTED),
        ("model_path", "some/model", Standing.TESTED),
        ("hicache_size", 8, Standing.TESTED),
        ("cuda_graph_backend_prefill", "full", Standing.UNKNOWN),
        ("enable_mixed_chunk", True, Standing.TESTED),
        ("radix_eviction_policy", "lfu", Standing.TESTED),
        ("radix_eviction_policy", "newest", Standing.UNKNOWN),
    ],
    ids=str,
)
def test_values_matter(field: str, value: Any, standing: Standing) -> None:
    assert judge(field, value).standing is standing


def test_what_keeps_kv_does_not_keep_pages_apart_and_files_count_with_their_content(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{}")

    def marks(**given: Any) -> dict[str, str]:
        return dict(flags.marks([judge(field, value) for field, value in given.items()]))

    assert marks(attention_backend="fa3", enable_two_batch_overlap=True, port=1, dtype="float16", pp_size=2) == {}
    # Or nothing of what it decodes would be found where prompts are computed.
    assert marks(disaggregation_mode="decode", disaggregation_decode_retraction_backup="none") == {}
    assert marks(enable_tf32_matmul=True, model_impl="transformers") == {
        "enable_tf32_matmul": "True",
        "model_impl": "transformers",
    }
    before = marks(decrypted_config_file=str(file))
    file.write_text('{"layers": 3}')
    assert marks(decrypted_config_file=str(file)) != before


def test_the_document_is_written_from_the_table() -> None:
    document = flag_report.document()
    assert (ROOT / "docs" / "flags.md").read_text() == document, (
        "python -m engine_patch.flag_report --write docs/flags.md"
    )
    assert all(f"`{flags.spelling(field)}`" in document for field in sgl.flag_defaults(ServerArgs))


def test_who_asks_is_told_every_flag_but_no_secret() -> None:
    arguments = ServerArgs(
        model_path="m",
        api_key="ags_secret",
        enable_two_batch_overlap=True,
        otlp_traces_endpoint="https://user:secret@traces.example:4317",
    )
    told = {one["flag"]: one["class"] for one in flags.told(sgl.given_flags(arguments))}
    assert told["--model-path m"] == "tested" and told["--api-key …"] == "tested"
    assert told["--enable-two-batch-overlap"] == judge("enable_two_batch_overlap", True).standing.value
    assert "secret" not in str(told) and "traces.example" in str(told)


def test_a_flag_is_spelled_as_sglang_takes_it() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    spellings = {name: action.dest for action in parser._actions for name in action.option_strings}
    with_flags = set(spellings.values())
    wrong = {field: flags.spelling(field) for field in sgl.flag_defaults(ServerArgs) if field in with_flags}
    assert {field: name for field, name in wrong.items() if spellings.get(name) != field} == {}


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["--max-total-tokens", "4096"], 0, "no effect on KV"),
        (["--attention-backend", "fa3"], 0, "not tested with AgentState: --attention-backend fa3"),
        (["--pp-size", "2"], 1, "--pp-size 2 does not go with --radix-cache-backend agentstate"),
    ],
    ids=["tested", "unknown", "refused"],
)
def test_a_check_prints_where_each_flag_stands(
    given: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flag_report.main(["--model-path", "some/model", *given]) == code
    shown = capsys.readouterr().out
    assert said in " ".join(shown.split()).replace(" │ ", " ")
    assert given[0] in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--tp-size", "two"], "invalid int value: 'two'"),
        (["--config", "/no/such.yaml"], "Config file not found: /no/such.yaml"),
        (["--lora-paths", '{"lora_path": "x"}'], "it does not contain 'lora_name'"),
    ],
    ids=["flag", "value", "file", "in a value"],
)
def test_a_check_tells_in_one_line_what_sglang_does_not_understand(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flag_report.main(["--model-path", "some/model", *given]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert said in captured.err
    assert captured.out == ""
