from __future__ import annotations

from dataclasses import replace

import sqlalchemy as sa

from agentstate.fleet import engines
from agentstate.fleet.engines import Engine
from agentstate.sql.database import Database

ENGINE = Engine("eng_1", "n1", 0, "tcp://127.0.0.1:5000", "http://127.0.0.1:30000/v1", "m", "f1", "/pages")


def names(found: list[Engine]) -> list[str]:
    return [engine.id for engine in found]


def age(connection: sa.Connection, engine_id: str, age_s: int) -> None:
    connection.execute(
        sa.text("UPDATE engines SET heartbeat_us = heartbeat_us - :us WHERE id = :id"),
        {"us": age_s * 1_000_000, "id": engine_id},
    )


def test_a_registered_engine_is_live_and_complete(database: Database) -> None:
    with database.write() as connection:
        complete = replace(ENGINE, control_secret="of this engine", shared_store="file:///share", dp_rank=1, dp_size=2)
        complete = replace(complete, reads=frozenset({"n2", "n3"}))
        engines.register(connection, complete)
        (found,) = engines.live(connection, 10)
    assert replace(found, started_us=0, heartbeat_us=0) == complete
    assert 0 < found.started_us <= found.heartbeat_us


def test_an_engine_without_heartbeats_is_not_live_until_it_sends_one(database: Database) -> None:
    with database.write() as connection:
        engines.register(connection, ENGINE)
        age(connection, "eng_1", 11)
        assert engines.live(connection, 10) == []
        assert names(engines.registered(connection)) == ["eng_1"]
        assert engines.heartbeat(connection, "eng_1")
        assert names(engines.live(connection, 10)) == ["eng_1"]


def test_a_heartbeat_says_what_an_engine_reads_by_then(database: Database) -> None:
    with database.write() as connection:
        engines.register(connection, ENGINE)
        for reads in ({"n3", "n2"}, {"n2"}, frozenset[str]()):
            assert engines.heartbeat(connection, "eng_1", reads)
            assert [found.reads for found in engines.live(connection, 10)] == [reads]
            assert [found.reads for found in engines.registered(connection)] == [reads]


def test_a_heartbeat_of_an_unknown_engine_tells_it_to_register(database: Database) -> None:
    with database.write() as connection:
        assert not engines.heartbeat(connection, "eng_1")
        engines.register(connection, ENGINE)
        engines.unregister(connection, "eng_1")
        assert not engines.heartbeat(connection, "eng_1")
        assert engines.registered(connection) == []


def test_engines_are_found_by_model_the_youngest_heartbeat_first(database: Database) -> None:
    with database.write() as connection:
        for number, model in enumerate(["m", "m", "other"]):
            engines.register(connection, replace(ENGINE, id=f"eng_{number}", model=model, pages_dir=f"/p{number}"))
        age(connection, "eng_0", 5)
        assert names(engines.live(connection, 10, model="m")) == ["eng_1", "eng_0"]
        assert names(engines.live(connection, 10, model="none")) == []


def test_a_restarted_rank_takes_the_place_of_its_former_self_only(database: Database) -> None:
    with database.write() as connection:
        engines.register(connection, ENGINE)
        engines.register(connection, replace(ENGINE, id="eng_rank1", rank=1))
        engines.register(connection, replace(ENGINE, id="eng_node2", node="n2"))
        engines.register(connection, replace(ENGINE, id="eng_again", control_address="tcp://127.0.0.1:6000"))
        assert set(names(engines.registered(connection))) == {"eng_again", "eng_rank1", "eng_node2"}


def test_an_engine_registers_again_under_its_own_id(database: Database) -> None:
    with database.write() as connection:
        engines.register(connection, ENGINE)
        engines.register(connection, ENGINE)
        assert names(engines.registered(connection)) == ["eng_1"]
