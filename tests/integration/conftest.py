"""A service and the engines that it asks, ended with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from engines import Asked, scripted
from gateways import Gateway
from stage import PATIENCE_S, Peer, Service, register, serving, stored

from agentstate.fleet import operations
from agentstate.settings import Settings


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    """They outlive the service, which may have asked them something that it still waits for."""
    peers: list[Peer] = []
    yield peers
    for peer in peers:
        peer.close()


@pytest.fixture
def service(peers: list[Peer], database_url: str, tmp_path: Path) -> Iterator[Service]:
    with serving(Settings(home=tmp_path, database_url=database_url, engine_timeout_s=3600)) as service:
        yield service


@pytest.fixture
def start_peer(peers: list[Peer], monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[dict[str, Any]], Any]], Peer]:
    """Starts an engine's control endpoint, whose answers the service waits for however long they take."""
    monkeypatch.setattr(operations, "GRACE_S", PATIENCE_S)

    def start(answer: Callable[[dict[str, Any]], Any]) -> Peer:
        peers.append(Peer(answer))
        return peers[-1]

    return start


@pytest.fixture
def make_gateway(
    database_url: str, tmp_path: Path, start_peer: Callable[..., Peer]
) -> Iterator[Callable[..., Gateway]]:
    with ExitStack() as ending:

        def make(script: Callable[[Asked], None], **settings: Any) -> Gateway:
            engine = ending.enter_context(scripted(script))
            peer = start_peer(lambda request: stored("durable"))
            own = {"home": tmp_path, "database_url": database_url, "engine_timeout_s": 3600, **settings}
            service = ending.enter_context(serving(Settings(**own)))
            register(service.database, peer.address, base_url=engine.base_url)
            return Gateway(service, engine, peer)

        yield make
