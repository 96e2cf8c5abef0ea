"""Where the tiers that are tested lie."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import obstore
from obstore.store import LocalStore, MemoryStore

from agentstate.tiers import DirectoryTier, ObjectTier, Tier
from agentstate.tiers.objects import open_store
from agentstate.tiers.testing.conformance import Place
from agentstate.tiers.testing.seaweedfs import Server

_numbers = count()


class Directory(Place):
    def __init__(self, root: Path):
        self.root = root

    def open(self) -> Tier:
        return DirectoryTier(self.root)

    def put(self, path: str, data: bytes) -> None:
        final = self.root / path
        final.parent.mkdir(parents=True, exist_ok=True)
        final.write_bytes(data)

    def remove(self, path: str) -> None:
        (self.root / path).unlink()


class Objects(Place):
    def __init__(self, store: Any, *, ordered: bool = True):
        self.store = store
        self.ordered = ordered

    def open(self) -> Tier:
        return ObjectTier(self.store, "the store", ordered=self.ordered)

    def put(self, path: str, data: bytes) -> None:
        obstore.put(self.store, path, data)

    def remove(self, path: str) -> None:
        obstore.delete(self.store, path)


def in_memory() -> Objects:
    return Objects(MemoryStore())


def local(root: Path) -> Objects:
    return Objects(LocalStore(root), ordered=False)


def on(server: Server, url: str | None = None, **environment: str) -> Objects:
    """A prefix of its own on the S3 server."""
    with patch.dict(os.environ, {**server.environment, **environment}):
        place = Objects(open_store(url or f"s3://tests/{os.getpid()}-{next(_numbers)}"))
    if url is None:
        # The bucket is made by the first object in it.
        obstore.put(place.store, "bucket", b"")
    return place
