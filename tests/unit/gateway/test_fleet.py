"""Which engines a gateway knows, and when it asks SQL again."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import cast

import pytest

from agentstate.api.gateway import fleet
from agentstate.api.gateway.errors import Refusal
from agentstate.api.gateway.fleet import Fleet
from agentstate.fleet import engines
from agentstate.fleet.engines import Engine
from agentstate.fleet.placement import Server
from agentstate.sql.database import Database


def server(model: str) -> Server:
    engine = Engine("eng", "n", 0, "tcp://x", f"http://{model}/v1", model, "f", "/pages", control_secret="s")
    return Server((engine,))


class Known(Fleet):
    """``stored`` stands in SQL, which answers while ``answers`` is set."""

    def __init__(self, *models: str):
        super().__init__(cast(Database, None), 30)
        self.stored = [server(model) for model in models]
        self.asked = 0
        self.answers = threading.Event()
        self.answers.set()

    def _look_up(self) -> list[Server]:
        self.asked += 1
        self.answers.wait()
        return self.stored

    def age(self, seconds: float) -> None:
        self._tried_s -= seconds


def test_a_request_does_not_wait_for_what_is_known() -> None:
    async def ask() -> None:
        known = Known("a")
        assert (await known.serving("a"))[0].model == "a"
        known.age(fleet.FRESH_S)
        known.answers.clear()
        for _ in range(2):
            assert (await known.serving("a"))[0].model == "a"
        known.answers.set()
        known.stored = [server("b")]
        await known.live()
        assert known.asked == 2
        await known.close()

    asyncio.run(ask())


def test_what_is_stale_is_read_again_before_it_is_used() -> None:
    async def ask() -> None:
        known = Known("a")
        await known.serving("a")
        known.stored = [server("b")]
        known.age(fleet.STALE_S)
        with pytest.raises(Refusal, match="no live engine serves 'a'"):
            await known.serving("a")
        assert known.asked == 2
        await known.close()

    asyncio.run(ask())


def test_an_engine_that_is_not_known_is_looked_for() -> None:
    async def ask() -> None:
        known = Known("a")
        await known.serving("a")
        known.stored = [server("a"), server("b")]
        known.age(fleet.FRESH_S)
        assert (await known.serving("b"))[0].model == "b"
        with pytest.raises(Refusal):
            await known.serving("c")
        assert known.asked == 2
        await known.close()

    asyncio.run(ask())


def test_an_adapter_is_asked_of_an_engine_of_its_model() -> None:
    async def ask() -> None:
        known = Known("a", "a:b")
        models = {"a": "a", "a:x": "a", "a:x:y": "a", "a:b": "a:b"}
        for wanted, served in models.items():
            assert [server.model for server in await known.serving(wanted)] == [served]
        with pytest.raises(Refusal):
            await known.serving("ab:x")
        # SGLang takes the longer name.
        assert {server.model for server in await known.serving("a:b:x")} == {"a", "a:b"}
        await known.close()

    asyncio.run(ask())


def test_of_the_dp_ranks_of_an_engine_one_stands_for_it(database: Database) -> None:
    with database.write() as connection:
        for dp_rank in (0, 1):
            rank = replace(server("m").ranks[0], id=f"eng_{dp_rank}", node=f"n{dp_rank}", dp_rank=dp_rank, dp_size=2)
            engines.register(connection, rank)
        engines.register(connection, server("other").ranks[0])

    async def ask() -> list[str]:
        known = Fleet(database, 30)
        return [one.base_url for one in await known.live()]

    assert sorted(asyncio.run(ask())) == ["http://m/v1", "http://other/v1"]
