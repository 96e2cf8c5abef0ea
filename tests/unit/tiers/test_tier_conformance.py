"""Every kind of tier keeps the same promises."""

from __future__ import annotations

from pathlib import Path

import places
import pytest

from agentstate.tiers import Guard, Tier
from agentstate.tiers.testing.conformance import Place, TierTests
from agentstate.tiers.testing.seaweedfs import Server


class TestDirectory(TierTests):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        root = tmp_path / "share"
        root.mkdir()
        return places.Directory(root)


class TestMemory(TierTests):
    @pytest.fixture
    def place(self) -> Place:
        return places.in_memory()


class TestLocalFilesThroughObstore(TierTests):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        root = tmp_path / "share"
        root.mkdir()
        return places.local(root)


class TestSeaweedFS(TierTests):
    @pytest.fixture
    def place(self, s3: Server) -> Place:
        return places.on(s3)


class Guarded(places.Objects):
    def open(self) -> Tier:
        return Guard(super().open())


class TestGuard(TierTests):
    """It keeps its tier's promises."""

    @pytest.fixture
    def place(self) -> Place:
        return Guarded(places.in_memory().store)
