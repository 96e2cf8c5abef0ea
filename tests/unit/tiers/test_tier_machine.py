"""Random histories of every kind of tier. A long run:
``TIER_EXAMPLES=1000 pytest tests/unit/tiers/test_tier_machine.py``."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import crashes
import places
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from tools import in_memory

from agentstate.tiers.testing.conformance import Place
from agentstate.tiers.testing.machine import TierMachine
from agentstate.tiers.testing.seaweedfs import Server

EXAMPLES = int(os.environ.get("TIER_EXAMPLES", "25"))


class DirectoryMachine(TierMachine):
    steps = 30

    def place(self) -> Place:
        self.root = Path(tempfile.mkdtemp(dir=in_memory()))
        return places.Directory(self.root)

    def crash(self, name: str, data: bytes, step: int) -> None:
        crashes.die(self.root, name, data, step)

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.root)


class MemoryMachine(TierMachine):
    def place(self) -> Place:
        return places.in_memory()


class LocalMachine(TierMachine):
    def place(self) -> Place:
        self.root = Path(tempfile.mkdtemp(dir=in_memory()))
        return places.local(self.root)

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.root)


class SeaweedMachine(TierMachine):
    server: Server

    def place(self) -> Place:
        return places.on(self.server)


def run(machine: type[TierMachine], examples: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize="TIER_EXAMPLES" not in os.environ,
        ),
    )


@pytest.mark.timeout(900 + 10 * EXAMPLES)
@pytest.mark.parametrize("machine", [DirectoryMachine, MemoryMachine, LocalMachine])
def test_any_history_ends_with_what_was_published(machine: type[TierMachine]) -> None:
    run(machine, EXAMPLES)


@pytest.mark.timeout(900 + 10 * EXAMPLES)
def test_so_does_any_on_a_real_server(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SeaweedMachine, "server", s3, raising=False)
    run(SeaweedMachine, max(3, EXAMPLES // 5))
