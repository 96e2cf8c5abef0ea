"""Start SGLang with the plug-in: find its interpreter, add the flags it needs, and check for what would make it fail.

The checks run before SGLang's half minute of start-up, so that a mistake costs one line instead of a traceback.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from agentstate.errors import EngineError, PageStoreFull, PageStoreUnwritable, SettingsError
from agentstate.private import make_directory
from agentstate.settings import Settings

BACKEND = "agentstate"
_LEAST_FREE_BYTES = 64 << 20


def engine_command(
    settings: Settings, arguments: list[str], environment: Mapping[str, str], *, stores: bool = True
) -> tuple[list[str], dict[str, str]]:
    """The command line that starts SGLang, with ``arguments`` passed through, and its environment: ``environment``, and
    defaults that SGLang needs on a CPU. Unless it ``stores``, SGLang's own radix cache stays in place.

    The caller's flags stay unchanged. Raises SettingsError, EngineError or PageStoreError for what would fail: no
    SGLang, no such model directory, a port that is taken, an unusable page directory.
    """
    python = engine_python(settings)
    model = value_of(arguments, "--model-path") or value_of(arguments, "--model")
    if model is None:
        raise SettingsError("which model? Give --model-path DIRECTORY, or a model's name on the hub")
    if (model.startswith((".", "/", "~")) or model.count("/") > 1) and not Path(model).exists():
        raise SettingsError(f"there is no model at {model}: check --model-path")
    port = value_of(arguments, "--port") or "30000"
    if not port.isdecimal() or int(port) > 65535:
        raise SettingsError(f"--port {port} is no port number")
    require_free_port(value_of(arguments, "--host") or "127.0.0.1", int(port))
    require_page_directory(settings.pages_path)
    if settings.read_backend == "kvikio" and not has_cuda():
        raise SettingsError("AGENTSTATE_READ_BACKEND=kvikio needs a GPU, and none is found here: set it to posix")
    if stores and value_of(arguments, "--radix-cache-backend") is None:
        arguments = [*arguments, "--radix-cache-backend", BACKEND]
    return sglang_command(python, arguments, environment)


def sglang_command(
    python: str, arguments: list[str], environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The command line that starts SGLang, with AgentState or without, and its environment: as given, plus defaults
    that it needs on a CPU. Every answer reports how much of the prompt was cached."""
    command = [python, "-m", "sglang.launch_server", *arguments]
    complete = dict(environment)
    if "--enable-cache-report" not in arguments:
        command += ["--enable-cache-report"]
    if not has_cuda():
        if value_of(arguments, "--device") is None:
            command += ["--device", "cpu"]
        # One core stays free for reading, spilling and serving, if the ranks leave one. A forward whose threads spin
        # while they wait would take it anyway.
        ranks, all_cores = _ranks(arguments), len(os.sched_getaffinity(0))
        threads = max(1, (all_cores - 1) // ranks)
        complete.setdefault("OMP_WAIT_POLICY", "passive")
        complete.setdefault("OMP_NUM_THREADS", str(threads))
        cores = (_core_range(rank * threads % all_cores, threads) for rank in range(ranks))
        complete.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(cores))
    return command, complete


def check_command(settings: Settings, arguments: list[str]) -> list[str]:
    """The command that prints the status of each SGLang flag of ``arguments`` with AgentState, and exits with 1 if one
    is refused. SGLang parses the flags itself, and loads no model. Raises EngineError if there is no SGLang."""
    return [engine_python(settings), "-W", "ignore", "-m", "engine_patch.flag_report", *arguments]


def engine_python(settings: Settings) -> str:
    """The interpreter that has SGLang: the configured one, or this one. Raises EngineError if it has none."""
    python = str(settings.engine_python or sys.executable)
    if not Path(python).exists():
        raise EngineError(f"AGENTSTATE_ENGINE_PYTHON is {python}, which does not exist")
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
    try:
        missing = subprocess.run([python, "-c", probe], check=False).returncode
    except OSError as error:
        raise EngineError(f"{python} cannot be run ({error.strerror}): set AGENTSTATE_ENGINE_PYTHON") from error
    if missing:
        raise EngineError(
            f"{python} has no SGLang: pip install 'agentstate[engine]' there, or set AGENTSTATE_ENGINE_PYTHON to the "
            "Python of an environment that has it"
        )
    return python


def require_free_port(host: str, port: int) -> None:
    """Raises SettingsError unless this process can listen on ``port`` of ``host``, an IPv4 or IPv6 address or a
    name."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise SettingsError(
            f"port {port} of {host} cannot be used ({error.strerror}): choose another with --port"
        ) from error


def require_page_directory(directory: Path) -> None:
    """Create ``directory``. Raises PageStoreUnwritable or PageStoreFull unless pages can be written to it."""
    advice = "point AGENTSTATE_PAGES_DIR at a directory on another disk"
    try:
        make_directory(directory)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PageStoreFull(
                f"the disk of the page directory {directory} is full: make room, or {advice}"
            ) from error
        raise PageStoreUnwritable(
            f"the page directory {directory} cannot be created ({error.strerror}): {advice}"
        ) from error
    for mode, what in ((os.W_OK | os.X_OK, "written"), (os.R_OK, "read")):
        if not os.access(directory, mode):
            raise PageStoreUnwritable(f"the page directory {directory} cannot be {what}: {advice}")
    disk = os.statvfs(directory)
    # If there are pages, the engine makes room by evicting some.
    if disk.f_bavail * disk.f_frsize < _LEAST_FREE_BYTES and not any(directory.glob("*/*/extents/*.ext")):
        raise PageStoreFull(f"the disk of the page directory {directory} is full: make room, or {advice}")


def reached(host: str) -> str:
    """The address, as a URL has it, at which a server that listens on ``host`` is reached from this machine."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def has_cuda() -> bool:
    """Whether a CUDA driver loads here and finds a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _ranks(arguments: list[str]) -> int:
    """How many ranks an engine has. Data parallel attention shares out those of one group, and replicas are groups."""
    tensor = _number(arguments, "--tp", "--tp-size", "--tensor-parallel-size")
    replicas = _number(arguments, "--dp", "--dp-size", "--data-parallel-size")
    return tensor if "--enable-dp-attention" in arguments else tensor * replicas


def _number(arguments: list[str], *flags: str) -> int:
    """1 if the value is no number: SGLang itself reports that as well as we could."""
    given = next((value for flag in flags if (value := value_of(arguments, flag))), "1")
    return max(1, int(given)) if given.isdecimal() else 1


def _core_range(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


def value_of(arguments: list[str], flag: str) -> str | None:
    """The value of ``--flag value`` or ``--flag=value``; the last one counts."""
    found = None
    for position, argument in enumerate(arguments):
        if argument == flag and position + 1 < len(arguments):
            found = arguments[position + 1]
        elif argument.startswith(flag + "="):
            found = argument.partition("=")[2]
    return found
