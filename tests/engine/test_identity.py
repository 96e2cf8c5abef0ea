from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sglang.srt.server_args import ServerArgs

from agentstate.errors import SettingsError
from engine_patch import identity, versions
from engine_patch.sglang_api import PoolName

# Of an engine of this shape at commit 34f7af3. If it changes, no page that is stored today is found again.
GOLDEN = "a301071d0b981a61464c77815bfe9bc18a93b24c6060708d049da54c87eb66d2"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"layers": 2}')
    header = json.dumps({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return directory


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Any:
    """The fingerprint of an engine that is started with these flags."""
    monkeypatch.setattr(versions, "installed", lambda: "0.5.23")
    pool = SimpleNamespace(name=PoolName.KV, layout=lambda: ["kv", 64, [0, 1], ["torch.bfloat16"], [[2, 8]], None])

    def compute(**given: Any) -> str:
        parallel = SimpleNamespace(
            attn_tp_rank=0, attn_tp_size=1, tp_size=1, pp_size=1, dp_rank=None, dp_size=1, attn_dp_size=1
        )
        arguments = ServerArgs(model_path=str(checkpoint), **given)
        monkeypatch.setattr(identity, "get_model", lambda: arguments)
        monkeypatch.setattr(identity, "get_parallel", lambda: parallel)
        monkeypatch.setattr(identity, "get_spec", lambda: arguments)
        return identity.fingerprints(arguments, 64, [pool])[0][PoolName.KV].hex()

    return compute


def test_what_is_stored_is_found_again_after_an_upgrade_of_ours(mark: Any) -> None:
    assert mark() == GOLDEN


def test_an_upgrade_of_sglang_keeps_the_pages_of_what_was_compared(
    mark: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def marks(architectures: Any) -> list[str]:
        (checkpoint / "config.json").write_text(json.dumps({"architectures": architectures}))
        found = []
        for version in ("0.5.22", "0.5.23", "0.5.99"):
            monkeypatch.setattr(versions, "installed", lambda version=version: version)
            found.append(mark())
        return found

    older, pinned, unknown = marks(["LlamaForCausalLM"])
    assert older == pinned != unknown
    for not_compared in (["OtherForCausalLM"], ["LlamaForCausalLM", "OtherForCausalLM"], [], None, "LlamaForCausalLM"):
        assert len(set(marks(not_compared))) == 3


def test_engines_that_embed_have_pages_of_their_own(mark: Any, checkpoint: Path) -> None:
    """Also what builds without a gate for their forwards have stored is not theirs: it was kept apart by the flag."""
    embeds = mark(is_embedding=True)
    assert embeds != GOLDEN
    assert mark(is_embedding=True, enable_metrics=True) == embeds
    (checkpoint / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    generates = mark()
    (checkpoint / "config.json").write_text(json.dumps({"architectures": ["LlamaEmbeddingModel"]}))
    assert mark() == mark(is_embedding=True) != generates


def test_what_does_not_reach_kv_does_not_keep_pages_apart(mark: Any) -> None:
    neutral = {"max_total_tokens": 4096, "enable_metrics": True, "attention_backend": "fa3", "host": "0.0.0.0"}
    assert mark(**neutral, enable_mixed_chunk=True, trust_remote_code=True) == GOLDEN


@pytest.mark.parametrize(
    "given",
    [
        {"dtype": "float16"},
        {"quantization": "fp8"},
        {"load_format": "dummy"},
        {"model_loader_extra_config": '{"a": 1}'},
        {"rl_quant_profile": "profile"},
        {"json_model_override_args": '{"rope_scaling": null}'},
        {"enable_tf32_matmul": True},
        {"enable_deterministic_inference": True},
        {"model_impl": "transformers"},
        {"mamba_ssm_dtype": "float16"},
    ],
    ids=str,
)
def test_what_may_reach_kv_keeps_pages_apart(mark: Any, given: dict[str, Any]) -> None:
    assert len({mark(), mark(**given)}) == 2


def test_pages_are_kept_apart_by_their_draft_model(mark: Any, checkpoint: Path, tmp_path: Path) -> None:
    """Also the target's: a page without the draft model's part is of no use."""
    draft = shutil.copytree(checkpoint, tmp_path / "draft")
    eagle = {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": str(draft)}
    before = mark(**eagle)
    own = mark(speculative_algorithm="EAGLE")
    standalone = mark(**eagle | {"speculative_algorithm": "STANDALONE"})
    quantized = mark(**eagle, speculative_draft_model_quantization="fp8")
    assert mark(**eagle, speculative_num_steps=5, speculative_num_draft_tokens=6) == before
    elsewhere = shutil.copytree(draft, tmp_path / "elsewhere")
    assert mark(**eagle | {"speculative_draft_model_path": str(elsewhere)}) == before
    weights = draft / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    trained = mark(**eagle)
    assert len({GOLDEN, before, standalone, quantized, trained}) == 5
    assert own == before  # here the checkpoints are the same
    assert mark(speculative_algorithm="NGRAM", speculative_num_draft_tokens=4) == GOLDEN


def test_a_flag_that_an_upgrade_brings_keeps_pages_apart_where_it_is_given(mark: Any, monkeypatch: Any) -> None:
    newer = type("Newer", (msgspec.Struct,), {"__annotations__": {"torchao_config": str}, "torchao_config": ""})
    given = identity.given_flags
    arguments = newer()
    monkeypatch.setattr(identity, "given_flags", lambda _: given(arguments))
    assert mark() == GOLDEN
    arguments.torchao_config = "int4wo-128"
    assert mark() != GOLDEN


def test_a_file_of_parameters_counts_with_its_content_wherever_it_lies(mark: Any, tmp_path: Path) -> None:
    file, moved = tmp_path / "scales.json", tmp_path / "moved.json"
    file.write_text('{"scale": 1}')
    moved.write_text('{"scale": 1}')
    before = mark(quantization_param_path=str(file))
    assert before != GOLDEN
    assert mark(quantization_param_path=str(moved)) == before
    file.write_text('{"scale": 2}')
    assert mark(quantization_param_path=str(file)) != before
    file.unlink()
    with pytest.raises(SettingsError, match="--quantization-param-path .*scales.json"):
        mark(quantization_param_path=str(file))


def test_code_beside_the_weights_counts_where_it_is_run(mark: Any, checkpoint: Path) -> None:
    (checkpoint / "modeling_own.py").write_text("layers = 2")
    assert mark() == GOLDEN
    before = mark(trust_remote_code=True)
    assert before != GOLDEN
    (checkpoint / "modeling_own.py").write_text("layers = 3")
    assert mark(trust_remote_code=True) != before


def test_a_model_of_the_hub_is_looked_for_where_it_was_downloaded_to(monkeypatch: Any, tmp_path: Path) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **given: asked.update(given, name=name) or str(tmp_path)
    )
    model = SimpleNamespace(model_path="org/model", revision="r1", download_dir="/models")
    assert identity.checkpoint_of(model) == tmp_path
    assert asked == {"name": "org/model", "revision": "r1", "cache_dir": "/models", "local_files_only": True}
