"""A service and the engines that it asks, ended with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stage import Peer, Service, serving

from agentstate.settings import Settings


@pytest.fixture
def service(database_url: str, tmp_path: Path) -> Iterator[Service]:
    with serving(Settings(home=tmp_path, database_url=database_url)) as service:
        yield service


@pytest.fixture
def start_peer() -> Iterator[Callable[[Callable[[dict[str, Any]], Any]], Peer]]:
    peers: list[Peer] = []

    def start(answer: Callable[[dict[str, Any]], Any]) -> Peer:
        peers.append(Peer(answer))
        return peers[-1]

    yield start
    for peer in peers:
        peer.close()
