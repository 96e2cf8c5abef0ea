"""Weights that are loaded into a running engine: no page of one model is ever given to another, and none is lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from stacks import ask_ranks, suspend
from test_models import Agent, Start, start  # noqa: F401


def update(engine_url: str, directory: Path) -> tuple[int, dict[str, Any]]:
    answer = httpx.post(f"{engine_url}/update_weights_from_disk", json={"model_path": str(directory)}, timeout=120)
    return answer.status_code, answer.json()


def retrained(checkpoint: Path, directory: Path) -> Path:
    """The same model with other weights: what it attends to is negated."""
    shutil.copytree(checkpoint, directory)
    (path,) = directory.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    base = 8 + int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8:base])
    for name, tensor in tensors.items():
        if "v_proj" in name:
            first, last = (base + offset for offset in tensor["data_offsets"])
            values = np.frombuffer(data, np.float32, (last - first) // 4, first)
            data[first:last] = (-values).tobytes()
    path.write_bytes(data)
    return directory


def test_pages_belong_to_the_weights_that_computed_them(start: Start, checkpoints: Path, tmp_path: Path) -> None:  # noqa: F811
    stack = start("llama")
    first = Agent(stack, 1, session_id=stack.begin_turn().engine_session)
    never = Agent(stack, 1, cache_salt="never suspended").second_turn()
    suspend(stack)
    (before,) = ask_ranks(stack, "stat")

    # A wrong path changes nothing, and costs nothing; nor do files that are not all there.
    short = shutil.copytree(checkpoints / "llama", tmp_path / "short")
    (file,) = short.glob("*.safetensors")
    os.truncate(file, file.stat().st_size // 2)
    for wrong, why in ((tmp_path / "no such directory", "no such directory"), (short, f"{file} ends ")):
        status, said = update(stack.engine_url, wrong)
        assert (status, said["success"]) == (400, False)
        assert why in said["message"]
    (stat,) = ask_ranks(stack, "stat")
    assert (stat["off"], stat["fingerprint"]) == (None, before["fingerprint"])
    resumed = first.second_turn()
    assert (resumed.tokens, resumed.restored) == (never.tokens, never.cached)
    suspend(stack)

    # Other weights find nothing of these, and what they compute is stored and restored.
    assert update(stack.engine_url, retrained(checkpoints / "llama", tmp_path / "retrained"))[0] == 200
    (stat,) = ask_ranks(stack, "stat")
    assert stat["off"] is None
    assert stat["fingerprint"] != before["fingerprint"]
    assert {rank.fingerprint for rank in stack.ranks()} == {stat["fingerprint"]}
    other = first.second_turn()
    assert other.restored == 0
    wanted = Agent(stack, 1, cache_salt="never suspended, retrained").second_turn()
    assert wanted.tokens != never.tokens
    second = Agent(stack, 1, session_id=stack.begin_turn().engine_session)
    suspend(stack)
    resumed = second.second_turn()
    assert (resumed.tokens, resumed.restored) == (wanted.tokens, wanted.cached)

    # With the first weights again, their pages are where they were.
    suspend(stack)
    assert update(stack.engine_url, checkpoints / "llama")[0] == 200
    (stat,) = ask_ranks(stack, "stat")
    assert (stat["off"], stat["fingerprint"]) == (None, before["fingerprint"])
    resumed = first.second_turn()
    assert resumed.tokens == never.tokens
    assert resumed.restored >= never.cached
