"""Every kind of tier keeps the same promises."""

from __future__ import annotations

from pathlib import Path

import places
import pytest

from agentstate.tiers import Guard, Tier
from agentstate.tiers.testing.conformance import PATIENCE_S, Place, TierTests
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

    def test_a_bucket_that_is_made_by_the_first_write_has_no_mark_before(self, s3: Server) -> None:
        with places.on(s3, "s3://made-by-a-mark/pages").open() as tier:
            assert tier.mark().result(PATIENCE_S) is None
            assert tier.mark("mine").result(PATIENCE_S) == "mine"


class Guarded(places.Objects):
    def open(self) -> Tier:
        return Guard(super().open())


class TestGuard(TierTests):
    """It keeps its tier's promises."""

    @pytest.fixture
    def place(self) -> Place:
        return Guarded(places.in_memory().store)
