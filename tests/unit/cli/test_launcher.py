from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentstate.cli import launcher, local
from agentstate.cli.launcher import (
    check_command,
    engine_command,
    engine_python,
    require_free_port,
    require_page_directory,
)
from agentstate.errors import AgentStateError, EngineError, PageStoreFull, PageStoreUnwritable, SettingsError
from agentstate.settings import Settings


@pytest.fixture
def with_sglang(tmp_path: Path) -> Path:
    """An interpreter that finds every module it is asked for."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    return python


@pytest.fixture
def settings(tmp_path: Path, with_sglang: Path) -> Settings:
    return Settings(home=tmp_path / "home", engine_python=with_sglang)


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    return str(tmp_path / "model")


@pytest.fixture
def free_port() -> str:
    return str(local.free_port())


@pytest.fixture
def taken_port() -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield str(listener.getsockname()[1])


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "has_cuda", lambda: False)
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "SGLANG_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)


def one_line(error: pytest.ExceptionInfo[AgentStateError]) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


def values(command: list[str], flag: str) -> list[str]:
    return [command[i + 1] for i, word in enumerate(command) if word == flag]


def test_what_is_not_given_is_completed(settings: Settings, model: str, free_port: str) -> None:
    arguments = ["--model-path", model, "--port", free_port]
    command, environment = engine_command(settings, arguments, os.environ)
    assert command[:3] == [str(settings.engine_python), "-m", "sglang.launch_server"]
    assert command[3:7] == arguments
    assert command[7:] == ["--radix-cache-backend", "agentstate", "--enable-cache-report", "--device", "cpu"]
    assert environment["OMP_WAIT_POLICY"] == "passive"
    assert environment["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) - 1))
    assert environment["PATH"] == os.environ["PATH"]
    assert settings.pages_path.is_dir()


def test_an_engine_that_does_not_store_is_sglang_as_it_is(settings: Settings, model: str, free_port: str) -> None:
    command, _ = engine_command(settings, ["--model-path", model, "--port", free_port], os.environ, stores=False)
    assert "--radix-cache-backend" not in command


def test_what_is_given_is_kept(settings: Settings, model: str, free_port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "3")
    arguments = [f"--model={model}", f"--port={free_port}", "--device=xpu", "--enable-cache-report"]
    arguments += ["--radix-cache-backend", "default", "--log-level", "debug"]
    command, environment = engine_command(settings, arguments, os.environ)
    assert command[3:] == arguments
    assert (environment["OMP_NUM_THREADS"], environment["SGLANG_CPU_OMP_THREADS_BIND"]) == ("7", "3")


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_a_core_is_left_free_where_there_is_more_than_one(
    settings: Settings, model: str, free_port: str, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    _, environment = engine_command(settings, ["--model-path", model, "--port", free_port], os.environ)
    found = environment["OMP_NUM_THREADS"], environment["SGLANG_CPU_OMP_THREADS_BIND"]
    assert found == {1: ("1", "0"), 2: ("1", "0"), 8: ("7", "0-6")}[cores]


@pytest.mark.parametrize(
    ("cores", "flag", "found"),
    [
        (1, "--tp=2", ("1", "0|0")),
        (2, "--tp=2", ("1", "0|1")),
        (9, "--tp-size=2", ("4", "0-3|4-7")),
        (8, "--tensor-parallel-size=2", ("3", "0-2|3-5")),
        (4, "--tp=two", ("3", "0-2")),
        (9, "--dp-size=2", ("4", "0-3|4-7")),
        (9, "--tp=2 --dp=2", ("2", "0-1|2-3|4-5|6-7")),
        (9, "--tp=2 --dp=2 --enable-dp-attention", ("4", "0-3|4-7")),
        (9, "--tp=2 --attn-dp-size=2", ("4", "0-3|4-7")),
    ],
)
def test_every_rank_has_cores_of_its_own(
    settings: Settings,
    model: str,
    free_port: str,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    flag: str,
    found: tuple[str, str],
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    given = ["--model-path", model, "--port", free_port, *flag.split()]
    _, environment = engine_command(settings, given, os.environ)
    assert (environment["OMP_NUM_THREADS"], environment["SGLANG_CPU_OMP_THREADS_BIND"]) == found


def test_with_a_gpu_the_device_and_its_threads_are_left_to_sglang(
    settings: Settings, model: str, free_port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "has_cuda", lambda: True)
    command, environment = engine_command(settings, ["--model-path", model, "--port", free_port], os.environ)
    assert "--device" not in command
    assert "OMP_NUM_THREADS" not in environment
    assert values(command, "--radix-cache-backend") == ["agentstate"]


def test_reading_into_a_gpu_is_refused_where_there_is_none(
    settings: Settings, model: str, free_port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "has_cuda", lambda: False)
    wanted = settings.model_copy(update={"read_backend": "kvikio"})
    arguments = ["--model-path", model, "--port", free_port]
    with pytest.raises(SettingsError, match="AGENTSTATE_READ_BACKEND=kvikio needs a GPU"):
        engine_command(wanted, arguments, os.environ)
    monkeypatch.setattr(launcher, "has_cuda", lambda: True)
    assert engine_command(wanted, arguments, os.environ)


def test_the_last_of_a_repeated_flag_counts(settings: Settings, model: str, free_port: str, taken_port: str) -> None:
    arguments = ["--model-path", "/nowhere", "--port", taken_port, f"--model-path={model}", "--port", free_port]
    command, _ = engine_command(settings, arguments, os.environ)
    assert command[-5] == "--radix-cache-backend"


@pytest.mark.parametrize("wrong", ["/no/such/model", "./model", "~/model", "models/of/mine"])
def test_a_model_directory_that_does_not_exist_is_named(settings: Settings, free_port: str, wrong: str) -> None:
    with pytest.raises(SettingsError) as error:
        engine_command(settings, ["--port", free_port, "--model-path", wrong], os.environ)
    assert f"there is no model at {wrong}: check --model-path" == one_line(error)


def test_a_name_on_the_hub_is_left_to_sglang(settings: Settings, free_port: str) -> None:
    command, _ = engine_command(settings, ["--model-path", "org/model", "--port", free_port], os.environ)
    assert values(command, "--model-path") == ["org/model"]


@pytest.mark.parametrize("arguments", [[], ["--model-path"], ["--port", "1"]])
def test_a_missing_model_is_asked_for(settings: Settings, arguments: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        engine_command(settings, arguments, os.environ)
    assert "--model-path" in one_line(error)


def test_a_taken_port_is_named(settings: Settings, model: str, taken_port: str) -> None:
    with pytest.raises(SettingsError) as error:
        engine_command(settings, ["--model-path", model, "--port", taken_port], os.environ)
    assert f"port {taken_port} of 127.0.0.1 cannot be used" in one_line(error)
    assert "--port" in one_line(error)


def test_a_host_that_is_not_this_machine_is_named(settings: Settings, model: str, free_port: str) -> None:
    with pytest.raises(SettingsError) as error:
        engine_command(settings, ["--model-path", model, "--port", free_port, "--host", "192.0.2.1"], os.environ)
    assert f"port {free_port} of 192.0.2.1 cannot be used" in one_line(error)


def test_looking_at_a_port_leaves_it_free(free_port: str) -> None:
    require_free_port("127.0.0.1", int(free_port))
    with socket.create_server(("127.0.0.1", int(free_port))), pytest.raises(SettingsError):
        require_free_port("127.0.0.1", int(free_port))


@pytest.mark.parametrize("port", ["http", "70000", "-1"])
def test_what_is_no_port_is_named(settings: Settings, model: str, port: str) -> None:
    with pytest.raises(SettingsError) as error:
        engine_command(settings, ["--model-path", model, f"--port={port}"], os.environ)
    assert port in one_line(error)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_an_ipv6_host_is_accepted(free_port: str) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", int(free_port)))
    except OSError:
        pytest.skip("no IPv6 here")
    require_free_port("::1", int(free_port))
    with socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", int(free_port)))
        probe.listen()
        with pytest.raises(SettingsError, match="::1"):
            require_free_port("::1", int(free_port))


def test_an_interpreter_without_sglang_is_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(EngineError) as error:
        engine_python(Settings(engine_python=python))
    assert one_line(error).startswith(f"{python} has no SGLang: pip install 'agentstate[engine]'")


def test_without_a_setting_this_interpreter_is_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sglang.py").write_text("raise SystemExit('looking for it must not import it')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert engine_python(Settings()) == sys.executable


def test_an_interpreter_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as error:
        engine_python(Settings(engine_python=tmp_path / "none"))
    assert f"AGENTSTATE_ENGINE_PYTHON is {tmp_path / 'none'}, which does not exist" == one_line(error)


@pytest.mark.parametrize("make", ["directory", "data"])
def test_an_interpreter_that_cannot_be_run_is_named(tmp_path: Path, make: str) -> None:
    python = tmp_path / "python"
    if make == "directory":
        python.mkdir()
    else:
        python.write_bytes(b"\0")
    with pytest.raises(EngineError) as error:
        engine_python(Settings(engine_python=python))
    assert str(python) in one_line(error)


@pytest.mark.parametrize("where", ["pages", "pages/below"])
def test_a_page_directory_that_cannot_be_made_is_named(
    settings: Settings, tmp_path: Path, model: str, free_port: str, where: str
) -> None:
    (tmp_path / "pages").write_text("a file")
    settings = settings.model_copy(update={"pages_dir": tmp_path / where})
    with pytest.raises(PageStoreUnwritable) as error:
        engine_command(settings, ["--model-path", model, "--port", free_port], os.environ)
    assert f"the page directory {tmp_path / where} cannot be created" in one_line(error)
    assert "AGENTSTATE_PAGES_DIR" in one_line(error)


@pytest.mark.parametrize(("refused", "what"), [(os.W_OK, "written"), (os.X_OK, "written"), (os.R_OK, "read")])
def test_a_page_directory_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int, what: str
) -> None:
    # For root every directory can be used, save that one on a file system that is mounted read-only is not written.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & refused)
    with pytest.raises(PageStoreUnwritable) as error:
        require_page_directory(tmp_path)
    assert f"the page directory {tmp_path} cannot be {what}: point AGENTSTATE_PAGES_DIR" in one_line(error)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk: Any = SimpleNamespace(f_bavail=10, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    with pytest.raises(PageStoreFull) as error:
        require_page_directory(tmp_path)
    assert f"the disk of the page directory {tmp_path} is full" in one_line(error)
    disk.f_bavail = 1 << 20
    require_page_directory(tmp_path / "pages")
    assert (tmp_path / "pages").is_dir()


def test_a_disk_that_is_full_of_pages_is_no_reason_not_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine evicts what others left there."""
    disk = SimpleNamespace(f_bavail=10, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    extent = tmp_path / "fingerprint" / "rank0" / "extents" / "1.ext"
    extent.parent.mkdir(parents=True)
    with pytest.raises(PageStoreFull):
        require_page_directory(tmp_path)
    extent.touch()
    require_page_directory(tmp_path)


def test_a_disk_without_room_for_the_directory_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(PageStoreFull):
        require_page_directory(tmp_path / "pages")


def test_a_check_is_made_by_the_interpreter_that_has_sglang(settings: Settings) -> None:
    command = check_command(settings, ["--model-path", "m", "--pp-size", "2"])
    assert command[0] == str(settings.engine_python)
    assert command[-5:] == ["engine_patch.flag_report", "--model-path", "m", "--pp-size", "2"]
    with pytest.raises(EngineError):
        check_command(Settings(engine_python=Path("/no/such/python")), [])
