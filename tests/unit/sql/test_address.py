from __future__ import annotations

import pytest

from agentstate.errors import DatabaseUnreachable
from agentstate.settings import Settings
from agentstate.sql import address
from agentstate.sql.database import Database


def parsed(database_url: str) -> address.Address:
    return address.parse(Settings(database_url=database_url).sqlalchemy_url)


@pytest.mark.parametrize(
    "database_url, hosts, ports",
    [
        ("postgresql://ada:pw@a,b/agents", "a,b", ","),
        ("postgresql://ada:pw@a:5432,b:5433/agents", "a,b", "5432,5433"),
        ("postgres://ada:pw@[::1]:5432,[fe80::2]/agents", "::1,fe80::2", "5432,"),
        ("postgresql://ada:pw@/agents?host=/run/a,/run/b&port=5432,5433", "/run/a,/run/b", "5432,5433"),
    ],
)
def test_several_hosts_are_told_to_the_driver(database_url: str, hosts: str, ports: str) -> None:
    found = parsed(database_url)
    assert (found.connect_args["host"], found.connect_args.get("port", ",")) == (hosts, ports)
    assert (found.url.username, found.url.password, found.url.database) == ("ada", "pw", "agents")
    assert "host" not in found.url.query


def test_a_server_must_be_writable_unless_the_url_says_otherwise() -> None:
    assert parsed("postgresql://a/agents").connect_args["target_session_attrs"] == "read-write"
    own = parsed("postgresql://a/agents?target_session_attrs=any")
    assert "target_session_attrs" not in own.connect_args
    assert own.url.query["target_session_attrs"] == "any" and not own.writable


def test_a_pgbouncer_is_named_in_the_url_and_not_told_to_the_driver() -> None:
    found = parsed("postgresql://a/agents?pgbouncer=true&application_name=x")
    assert found.pooled and dict(found.url.query) == {"application_name": "x"}
    assert not parsed("postgresql://a/agents?pgbouncer=false").pooled
    assert not parsed("postgresql://a/agents").pooled


@pytest.mark.parametrize(
    "database_url",
    [
        "postgresql://ada:hunter2@127.0.0.1:1/agents",
        "postgresql://127.0.0.1:1/agents?user=ada&password=hunter2",
        "postgresql://127.0.0.1:1,127.0.0.1:2/agents?user=ada&password=hunter2",
        "postgresql://127.0.0.1:1/agents?user=ada&sslpassword=hunter2&password=hunter2",
        "postgresql://ada:hunter%32@127.0.0.1:1/agents",
        "postgresql://ada:hunter/2#?x@127.0.0.1:1/agents",
    ],
)
def test_a_password_is_not_shown_however_it_was_given(database_url: str) -> None:
    database = Database(Settings(database_url=database_url).sqlalchemy_url)
    assert "127.0.0.1:1" in database.url and "/agents" in database.url
    with pytest.raises(DatabaseUnreachable) as error:
        database.check_schema()
    for text in (database.url, str(error.value)):
        assert "hunter" not in text


@pytest.mark.parametrize(
    "text, masked",
    [
        ("at postgresql://ada:hunter2@db/agents: no", "at postgresql://ada:***@db/agents: no"),
        ("http://u:p%40ss@collector:4318/v1", "http://u:***@collector:4318/v1"),
        ("dsn host=db password=hunter2 user=ada", "dsn host=db password=*** user=ada"),
        ("?sslpassword=x&a=b", "?sslpassword=***&a=b"),
        ("GET http://host:80/path and mail@host", "GET http://host:80/path and mail@host"),
    ],
)
def test_what_looks_like_a_password_is_masked_in_any_text(text: str, masked: str) -> None:
    assert address.mask(text) == masked


def test_a_known_secret_is_masked_as_a_word_of_its_own() -> None:
    assert address.mask("a cat ate a/b", ["a"]) == "*** cat ate ***/b"
    assert address.mask("hunter%2F2 hunter/2", ["hunter/2"]) == "*** ***"
