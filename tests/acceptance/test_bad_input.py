"""A page directory that an engine cannot have: it says so in one line, with what to do, and nothing that is there is
lost."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from contents import MLA, keys, write
from prompts import PAGE, TINY, Generator, prompt
from stacks import MakeStack

from agentstate.cli.local import LocalStack
from agentstate.errors import EngineError
from agentstate.pages import PageStore, fingerprint


@pytest.fixture
def first(tmp_path: Path, make_stack: MakeStack, checkpoints: Path) -> Iterator[LocalStack]:
    with closing(make_stack(tmp_path / "first", checkpoints / "llama")) as stack:
        stack.create_database()
        stack.start_engine(*TINY)
        yield stack


def said_at_the_end(stack: LocalStack) -> str:
    """What an engine says that cannot start."""
    log = stack.home / "engine.log"
    before = log.read_text() if log.exists() else ""
    with pytest.raises(EngineError):
        stack.start_engine(*TINY)
    said = log.read_text().removeprefix(before)
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "AgentState: " in line]
    return line.partition("AgentState: ")[2]


def test_a_directory_that_another_engine_has_or_left(
    first: LocalStack, tmp_path: Path, make_stack: MakeStack, checkpoints: Path
) -> None:
    text = prompt(80, 6 * PAGE + 3)
    right = Generator(first.engine_url)(text)
    first.settle()
    pages = first.home / "pages"
    (directory,) = pages.glob("*/rank0")
    with closing(make_stack(tmp_path / "second", checkpoints / "llama")) as second:
        second.environment = {**second.environment, "AGENTSTATE_PAGES_DIR": str(pages)}
        second.create_database()
        assert said_at_the_end(second) == (
            f"another engine writes to {directory}: stop it, or give this one a directory of its own with "
            "AGENTSTATE_PAGES_DIR, and the other's with AGENTSTATE_PAGES_SIBLINGS to restore from it"
        )
    first.flush_device()
    restored = Generator(first.engine_url)(text)
    assert (restored.tokens, restored.restored) == (right.tokens, 6 * PAGE)
    first.stop_engine()

    # Copied there by somebody who did not look.
    other = PageStore(tmp_path / "other" / "rank0", fingerprint(model="another"), MLA)
    write(other, keys(1))
    other.close()
    foreign = directory / "extents" / f"{1 << 32:016x}.ext"
    shutil.copy(next((other.directory / "extents").iterdir()), foreign)
    said = said_at_the_end(first)
    assert said.startswith(f"{foreign} was written for another model or layout than this store's: delete it")
    foreign.unlink()

    # What is no directory at all.
    directory.rename(tmp_path / "away")
    directory.write_text("a file")
    said = said_at_the_end(first)
    assert said.startswith(f"the page directory {directory} cannot be written")
    assert said.endswith("make it writable, or point AGENTSTATE_PAGES_DIR at another directory")
    directory.unlink()
    (tmp_path / "away").rename(directory)

    first.start_engine(*TINY)
    restored = Generator(first.engine_url)(text)
    assert (restored.tokens, restored.restored) == (right.tokens, 6 * PAGE)
