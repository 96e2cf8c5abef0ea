from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agentstate.errors import SettingsError
from agentstate.pages import fingerprint as module_surface
from agentstate.pages import weights_digest
from agentstate.pages.fingerprint import fingerprint

MIB = 1 << 20


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"layers": 2}')
    (tmp_path / "model-1.safetensors").write_bytes(bytes(5 * MIB))
    (tmp_path / "model-2.safetensors").write_bytes(b"small")
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
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env={"PYTHONHASHSEED": "7"},
    )
    assert run.stdout.strip() == fingerprint(layers=3, dtype="x").hex(), run.stderr


def test_what_is_no_json_value_is_refused() -> None:
    with pytest.raises(TypeError):
        fingerprint(dtype=object())


@pytest.mark.parametrize("offset", [0, MIB - 1, 5 * MIB // 2, 4 * MIB, 5 * MIB - 1])
def test_a_change_of_the_weights_at_their_begin_middle_and_end_changes_the_digest(
    checkpoint: Path, offset: int
) -> None:
    before = weights_digest(checkpoint)
    changed(checkpoint / "model-1.safetensors", offset)
    assert weights_digest(checkpoint) != before


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
