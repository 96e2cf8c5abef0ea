from __future__ import annotations

from pathlib import Path

import pytest

from agentstate import settings as settings_module
from agentstate.errors import SettingsError
from agentstate.settings import Settings


def test_without_an_environment_everything_is_below_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    settings = Settings()
    assert settings.home == Path("/home/ada/.local/share/agentstate")
    assert settings.pages_path == settings.home / "pages"
    assert settings.sqlalchemy_url == "sqlite:////home/ada/.local/share/agentstate/agentstate.db"
    assert (settings.host, settings.port) == ("127.0.0.1", 8700)


def test_the_environment_sets_every_kind_of_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTSTATE_PORT", "9000")
    monkeypatch.setenv("AGENTSTATE_PAGES_DIR", "~/nvme")
    monkeypatch.setenv("AGENTSTATE_STAGING_BYTES", "64MiB")
    monkeypatch.setenv("AGENTSTATE_LOG_LEVEL", "")
    monkeypatch.setenv("HOME", "/home/ada")
    settings = Settings()
    assert settings.port == 9000
    assert settings.pages_path == Path("/home/ada/nvme")
    assert settings.staging_bytes == 64 * 2**20
    assert settings.log_level == "info"


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_spelling_of_postgresql_goes_through_psycopg(scheme: str) -> None:
    settings = Settings(database_url=f"{scheme}://u:p@db:5432/agents?sslmode=require")
    assert settings.sqlalchemy_url == "postgresql+psycopg://u:p@db:5432/agents?sslmode=require"


def test_a_sqlite_url_is_taken_as_it_is() -> None:
    assert Settings(database_url="sqlite:////data/a.db").sqlalchemy_url == "sqlite:////data/a.db"


def test_all_wrong_variables_are_named_and_no_value_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTSTATE_PORT", "hunter2")
    monkeypatch.setenv("AGENTSTATE_LEASE_TTL_S", "-1")
    with pytest.raises(SettingsError) as error:
        Settings()
    assert "AGENTSTATE_PORT" in str(error.value)
    assert "AGENTSTATE_LEASE_TTL_S" in str(error.value)
    assert "hunter2" not in str(error.value)


def test_what_kubernetes_sets_for_a_service_of_our_name_is_no_port(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A Service named agentstate; and of what else it sets nothing is a setting."""
    given = {"PORT": "tcp://10.0.0.1:8700", "PORT_8700_TCP": "tcp://10.0.0.1:8700", "PORT_8700_TCP_PORT": "8700"}
    given |= {"SERVICE_HOST": "10.0.0.1", "SERVICE_PORT": "8700", "SERVICE_PORT_HTTP": "8700"}
    for name, value in {**given, "PORT_8700_TCP_ADDR": "10.0.0.1", "PORT_8700_TCP_PROTO": "tcp"}.items():
        monkeypatch.setenv(f"AGENTSTATE_{name}", value)
    settings_module._say_once.cache_clear()
    assert Settings().port == Settings().port == 8700
    (line,) = caplog.messages
    assert "enableServiceLinks: false" in line and "tcp://10.0.0.1:8700" in line
    assert Settings(port=9000).port == 9000
    monkeypatch.setenv("AGENTSTATE_PORT", "http://10.0.0.1:8700")
    with pytest.raises(SettingsError, match="AGENTSTATE_PORT"):
        Settings()


def test_a_read_backend_is_one_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().read_backend == "posix"
    monkeypatch.setenv("AGENTSTATE_READ_BACKEND", "kvikio")
    assert Settings().read_backend == "kvikio"
    monkeypatch.setenv("AGENTSTATE_READ_BACKEND", "mmap")
    with pytest.raises(SettingsError, match="AGENTSTATE_READ_BACKEND"):
        Settings()


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
