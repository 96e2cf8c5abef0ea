"""What else can stand between a client and an engine, and does nothing but forward: LiteLLM's proxy and SGLang's
router, each with its own defaults, if they are installed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agentstate.cli.local import ChildProcess, free_port
from agentstate.errors import SettingsError

_START_S = 300


@dataclass(frozen=True)
class Forwarder:
    """``executable`` is looked for on the path, unless the user says where it is. ``command`` makes the arguments of
    one that forwards requests for models, each to the engine at its base URL, from a port; its files go to a
    directory. ``ready`` is the path that answers once it runs. One of ``one_engine`` does not tell models apart."""

    name: str
    package: str
    executable: str
    command: Callable[[dict[str, str], int, Path], list[str]]
    ready: str
    one_engine: bool = False

    def find(self, given: str | None) -> Path | None:
        """Where it is; None if it is not there. Raises SettingsError if it is not where the user says."""
        found = shutil.which(given or self.executable)
        if given and found is None:
            raise SettingsError(f"{given} cannot be run: say where {self.executable} of {self.package} is")
        return None if found is None else Path(found).absolute()


def _litellm(engines: dict[str, str], port: int, home: Path) -> list[str]:
    models = [
        {
            "model_name": model,
            "litellm_params": {"model": f"openai/{model}", "api_base": base_url, "api_key": "none"},
        }
        for model, base_url in engines.items()
    ]
    config = home / "litellm.yaml"
    config.write_text(json.dumps({"model_list": models}))  # JSON is YAML
    return ["--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]


def _router(engines: dict[str, str], port: int, home: Path) -> list[str]:
    (base_url,) = engines.values()
    arguments = ["launch", "--worker-urls", base_url.removesuffix("/v1"), "--host", "127.0.0.1", "--port", str(port)]
    return [*arguments, "--prometheus-port", str(free_port()), "--log-level", "warn"]


LITELLM = Forwarder("LiteLLM's proxy", "litellm", "litellm", _litellm, "/health/liveliness")
ROUTER = Forwarder("SGLang's router", "sglang-router", "smg", _router, "/health", one_engine=True)


@contextmanager
def running(forwarder: Forwarder, executable: Path, engines: dict[str, str], home: Path) -> Iterator[tuple[str, int]]:
    """The forwarder in front of ``engines``, base URLs by model: its URL, and its process group."""
    port = free_port()
    directory = home / f"{forwarder.package}-{port}"
    directory.mkdir()
    command = [str(executable), *forwarder.command(engines, port, directory)]
    # Like the service, it listens on loopback only and wants no key.
    environment = {**os.environ, "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
    process = ChildProcess(command, environment, directory / "log")
    try:
        process.await_answer(f"http://127.0.0.1:{port}{forwarder.ready}", _START_S)
        yield f"http://127.0.0.1:{port}", process.group
    finally:
        process.terminate(timeout_s=10)


def interpreters(executables: Sequence[Path]) -> list[Path]:
    """Those that have the executables' packages."""
    return [path.with_name("python") for path in executables]
