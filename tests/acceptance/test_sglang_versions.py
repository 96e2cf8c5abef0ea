"""Two versions of SGLang share a page directory: if they lay KV out alike, each restores what the other has stored.
Run by `.ci/canary.py`, which names the interpreter of the second one."""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from prompts import PAGE, TINY, Generator, prompt

from agentstate.cli.local import LocalStack, free_port
from agentstate.pages.files import read_header
from engine_patch import versions

PAGES = 9


@pytest.fixture(scope="session")
def other_python() -> Path:
    """The interpreter of an environment with another SGLang."""
    name = "AGENTSTATE_OTHER_ENGINE_PYTHON"
    if name not in os.environ:
        pytest.skip(f"{name} is not set: python .ci/canary.py --restore VERSION sets it")
    return Path(os.environ[name])


@pytest.mark.parametrize("kind", ["llama", "mla"])
@pytest.mark.parametrize("first_stores", [True, False], ids=["pinned stores", "other stores"])
def test_versions_restore_what_others_of_their_layout_have_stored(
    other_python: Path, tmp_path: Path, checkpoints: Path, engine_python: Path, kind: str, first_stores: bool
) -> None:
    order = [engine_python, other_python] if first_stores else [other_python, engine_python]
    first, second = (layout(python, checkpoints / kind) for python in order)
    text = prompt(9900, PAGES * PAGE + 9)
    with ExitStack() as running:
        storing, restoring = (
            running.enter_context(closing(engine(tmp_path / "home", checkpoints / kind, python))) for python in order
        )
        storing.create_database()
        storing.start_engine(*TINY, "--page-size", str(PAGE))
        generate = Generator(storing.engine_url)
        right = generate(text)
        suspend(storing)
        restored = generate(text)
        assert (restored.tokens, restored.restored) == (right.tokens, PAGES * PAGE)
        storing.stop_engine()
        restoring.start_engine(*TINY, "--page-size", str(PAGE))
        generate = Generator(restoring.engine_url)
        restored = generate(text)
        assert (restored.tokens, restored.restored) == (right.tokens, PAGES * PAGE if first == second else 0)
        # What it computes itself is another namespace's.
        computed = generate(text, extra_key="computed")
        assert (computed.tokens, computed.cached) == (right.tokens, 0)
        suspend(restoring)
        damage(restoring, page=5)
        recomputed = generate(text)
        assert recomputed.tokens == right.tokens
        assert recomputed.restored <= 5 * PAGE


def suspend(stack: LocalStack) -> None:
    """Wait until everything that was offered is stored, and empty the device."""
    while stack.stat()["spill"]["waiting"]:
        time.sleep(0.05)
    stack.flush_device()


def layout(python: Path, checkpoint: Path) -> str:
    command = [python, "-c", "from importlib.metadata import version; print(version('sglang'))"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    (architecture,) = json.loads((checkpoint / "config.json").read_text())["architectures"]
    return versions.layout(found, architecture)


def damage(stack: LocalStack, page: int) -> None:
    """Flip a bit of a page in every extent that is so long."""
    for path in (stack.home / "pages").glob("*/rank0/extents/*.ext"):
        header = read_header(path)
        if len(header.keys) > page:
            offset, length = header.layout.component_range(header.geometry.layers - 1, 0, page, 1)
            with path.open("r+b") as file:
                file.seek(offset + length // 2)
                (byte,) = file.read(1)
                file.seek(offset + length // 2)
                file.write(bytes([byte ^ 1]))


def engine(home: Path, checkpoint: Path, python: Path) -> LocalStack:
    """Started as an operator does: a fork would have imported the SGLang of the environment that it was forked in."""
    stack = LocalStack(home, checkpoint, engine_python=python, service_port=free_port(), engine_port=free_port())
    own = {"AGENTSTATE_BREAK_EVEN": "off", "AGENTSTATE_FORESIGHT": "off"}
    stack.environment = {**stack.environment, **own}
    return stack
