from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentstate.errors import SettingsError
from agentstate.pages import configuration, tensor_names, weights_digest
from agentstate.pages import fingerprint as module_surface
from agentstate.pages.fingerprint import fingerprint

TENSORS = {"a": (0, 300_000), "b": (300_000, 300_010), "c": (300_010, 2_000_000)}


def safetensors(path: Path, tensors: dict[str, tuple[int, int]]) -> int:
    """Write a safetensors file of zeros: the offset of its first tensor."""
    header = json.dumps({name: {"dtype": "U8", "data_offsets": span} for name, span in tensors.items()}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(max(end for _, end in tensors.values())))
    return 8 + len(header)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"layers": 2}')
    safetensors(tmp_path / "model-1.safetensors", TENSORS)
    safetensors(tmp_path / "model-2.safetensors", {"d": (0, 5)})
    return tmp_path


def changed(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x01")


def test_the_order_of_the_fields_does_not_matter_and_everything_else_does() -> None:
    marks = {
        fingerprint(dtype="bfloat16", rows=[[8, 64]]),
        fingerprint(rows=[[8, 64]], dtype="bfloat16"),
        fingerprint(dtype="float16", rows=[[8, 64]]),
        fingerprint(dtype="bfloat16", rows=[[64, 8]]),
        fingerprint(dtype="bfloat16", rows=[[8], [64]]),
        fingerprint(dtype="bfloat16", row=[[8, 64]]),
        fingerprint(dtype="bfloat16"),
        fingerprint(dtype=None, rows=[[8, 64]]),
    }
    assert len(marks) == 7
    assert {len(mark) for mark in marks} == {32}
    assert module_surface is fingerprint


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    program = "from agentstate.pages import fingerprint; print(fingerprint(dtype='x', layers=3).hex())"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        env={"PYTHONHASHSEED": "7"},
    )
    assert run.stdout.strip() == fingerprint(layers=3, dtype="x").hex(), run.stderr


def test_what_is_no_json_value_is_refused() -> None:
    with pytest.raises(TypeError):
        fingerprint(dtype=object())


@pytest.mark.parametrize("offset", [0, 299_999, 300_005, 300_010, 1_150_000, 1_999_999])
def test_a_change_of_any_tensor_at_its_begin_middle_or_end_changes_the_digest(checkpoint: Path, offset: int) -> None:
    before = weights_digest(checkpoint)
    base = safetensors(checkpoint / "model-1.safetensors", TENSORS)
    assert weights_digest(checkpoint) == before
    changed(checkpoint / "model-1.safetensors", base + offset)
    assert weights_digest(checkpoint) != before


def test_a_file_that_is_no_safetensors_is_sampled(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(bytes(1_000_000))
    before = weights_digest(tmp_path)
    assert weights_digest(tmp_path / "model.bin") == before
    changed(tmp_path / "model.bin", 999_999)
    assert weights_digest(tmp_path) != before


def test_a_damaged_safetensors_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "model-2.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0nojso")
    with pytest.raises(SettingsError, match="model-2.safetensors"):
        weights_digest(checkpoint)


def test_a_safetensors_file_that_is_not_all_there_is_named(checkpoint: Path) -> None:
    path = checkpoint / "model-1.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    for ask in (weights_digest, tensor_names):
        with pytest.raises(SettingsError, match="model-1.safetensors ends 10 bytes too early"):
            ask(checkpoint)


def test_names_sizes_and_the_configuration_count(checkpoint: Path) -> None:
    digests = {weights_digest(checkpoint)}
    (checkpoint / "config.json").write_text('{"layers": 3}')
    digests.add(weights_digest(checkpoint))
    (checkpoint / "quantize_config.json").write_text("{}")
    digests.add(weights_digest(checkpoint))
    (checkpoint / "model-2.safetensors").rename(checkpoint / "model-3.safetensors")
    digests.add(weights_digest(checkpoint))
    with (checkpoint / "model-1.safetensors").open("ab") as file:
        file.write(b"\0")
    digests.add(weights_digest(checkpoint))
    (checkpoint / "model-3.safetensors").unlink()
    digests.add(weights_digest(checkpoint))
    assert len(digests) == 6


def test_the_tensors_of_all_files_are_named(checkpoint: Path) -> None:
    assert tensor_names(checkpoint) == {"a", "b", "c", "d"}
    (checkpoint / "model-2.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0nojso")
    with pytest.raises(SettingsError, match="model-2.safetensors"):
        tensor_names(checkpoint)
    (checkpoint / "model-2.safetensors").rename(checkpoint / "model-2.bin")
    assert tensor_names(checkpoint) == set()


def test_the_configuration_is_what_the_files_hold(checkpoint: Path) -> None:
    assert configuration(checkpoint) == {"config.json": b'{"layers": 2}'}
    assert configuration(checkpoint / "model-1.safetensors") == {}


def test_the_directory_and_files_that_are_no_weights_do_not_count(checkpoint: Path, tmp_path: Path) -> None:
    before = weights_digest(checkpoint)
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "README.md").write_text("a model")
    assert weights_digest(checkpoint) == before
    link = tmp_path.parent / "renamed"
    link.symlink_to(checkpoint)
    assert weights_digest(link) == before


@pytest.mark.parametrize("make", ["missing", "empty", "file"])
def test_a_directory_without_weights_is_refused_by_name(tmp_path: Path, make: str) -> None:
    directory = tmp_path / "model"
    if make == "empty":
        directory.mkdir()
        (directory / "config.json").write_text("{}")
    elif make == "file":
        directory.write_text("")
    with pytest.raises(SettingsError, match=f"no model weights in {directory}"):
        weights_digest(directory)
