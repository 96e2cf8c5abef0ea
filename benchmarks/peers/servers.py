"""SGLang servers that keep KV in other ways than this one, as child processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import httpx

from agentstate.benchmarks import device
from agentstate.cli import launcher
from agentstate.cli.local import ChildProcess, flush_device, free_port
from agentstate.errors import EngineError

_STILL_S = 2.0
_SETTLE_S = 60.0


class Server(ABC):
    """SGLang with one way to keep KV, on a port of loopback; everything that it stores is below ``home``.

    ``arguments`` are SGLang's, the same for all servers compared; ``python`` is the interpreter that has it.
    """

    name: ClassVar[str]
    stores: ClassVar[bool] = True
    """Whether KV outlives a flush of the device's cache."""

    def __init__(self, home: Path, checkpoint: Path, python: Path, arguments: Sequence[str]):
        self.home = home
        self.python = python
        self.stored = home / "stored"
        self.stored.mkdir(parents=True)
        self.options: list[str] = []
        self.url = ""
        self._checkpoint = checkpoint
        self._arguments = arguments
        self._engine: ChildProcess | None = None

    def why_not(self) -> str | None:
        """Why it cannot run on this machine; None when nothing is known to be in the way."""
        return None

    def start(self) -> None:
        """Raises EngineError, with the end of its log, if it does not come up."""
        flags = self._flags()
        self.options = [flag.replace(str(self.home), self.name) for flag in flags]
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        given = ["--model-path", str(self._checkpoint), "--host", "127.0.0.1", "--port", str(port)]
        given += ["--max-total-tokens", "32768", *self._arguments, *flags]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **self._environment()}
        command, environment = launcher.sglang_command(str(self.python), given, environment)
        self._engine = ChildProcess(command, environment, self.home / "engine.log")
        self._engine.await_answer(f"{self.url}/health", 300)

    def stop(self) -> None:
        """SIGKILL. What has been stored stays."""
        if self._engine is not None:
            self._engine.kill()
            self._engine = None

    def delete(self) -> None:
        """Delete what it has stored."""
        shutil.rmtree(self.home)

    def flush(self) -> None:
        """Empty the device's cache, and the host's if the engine has one of its own."""
        flush_device(self.url)

    def forget(self) -> None:
        """Make the next restore cold: leave what is stored in files alone, and those not in the page cache."""
        device.drop_from_page_cache(self._files())

    def settle(self) -> None:
        """Wait until nothing has been written for two seconds. Raises EngineError if nothing is stored at all."""
        deadline, before, since = time.monotonic() + _SETTLE_S, -1, time.monotonic()
        while time.monotonic() < deadline:
            if (now := self.stored_bytes()) != before:
                before, since = now, time.monotonic()
            elif now and time.monotonic() - since > _STILL_S:
                return
            time.sleep(0.2)
        raise EngineError(f"{self.name} has stored {before:,} bytes after {_SETTLE_S:.0f} s, and has not come to rest")

    def stored_bytes(self) -> int:
        total = 0
        for path in self._files():
            with suppress(FileNotFoundError):  # it was a name for the time of writing
                total += path.stat().st_size
        return total

    def bytes_read(self) -> int:
        """The bytes that its processes have read from the drive since their start; the page cache is no drive."""
        return sum(device.bytes_read(process.group) for process in self._processes())

    def _processes(self) -> list[ChildProcess]:
        return [] if self._engine is None else [self._engine]

    def _files(self) -> list[Path]:
        return [path for path in self.stored.rglob("*") if path.is_file()]

    @abstractmethod
    def _flags(self) -> list[str]:
        """The flags that SGLang needs for this."""

    def _environment(self) -> Mapping[str, str]:
        return {}


class RadixCache(Server):
    """SGLang as it is: what leaves the device has to be computed again."""

    name = "sglang"
    stores = False

    def settle(self) -> None:
        """Nothing is stored."""

    def _flags(self) -> list[str]:
        return []


class FileLinkerServer(Server):
    """`agentstate.benchmarks.peers.file_linker`."""

    name = "file_linker"

    def _flags(self) -> list[str]:
        config = {
            "linker": "FileLinker",
            "linker_module_path": "agentstate.benchmarks.peers.file_linker",
            "linker_extra_config": {"directory": str(self.stored)},
        }
        flags = ["--enable-unified-cache-external-linker", "--unified-cache-external-linker-backend", "dynamic"]
        return [*flags, "--unified-cache-external-linker-config", json.dumps(config)]


class HiCache(Server):
    """SGLang's hierarchical cache: host memory, and files behind it."""

    name = "hicache"

    def _flags(self) -> list[str]:
        return [
            *("--enable-hierarchical-cache", "--hicache-size", "2"),
            *("--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"),
            *("--hicache-storage-backend", "file", "--hicache-write-policy", "write_through"),
            *("--hicache-storage-prefetch-policy", "wait_complete"),
        ]

    def _environment(self) -> Mapping[str, str]:
        environment = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(self.stored)}
        if not launcher.has_cuda():
            plugins = self.home / "plugins"
            _install_plugin(plugins, "agentstate.benchmarks.peers.hicache_on_cpu:register")
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(plugins), os.environ.get("PYTHONPATH"))))
        return environment


class LMCache(Server):
    """LMCache: a daemon that keeps pages in its memory, which engines share with it, and in files behind that.

    Chunks are pages of 64 tokens: with its default of 256, it restores more slowly here.
    """

    name = "lmcache"

    def __init__(self, home: Path, checkpoint: Path, python: Path, arguments: Sequence[str]):
        super().__init__(home, checkpoint, python, arguments)
        self._daemon: ChildProcess | None = None
        self._memory = f"agentstate-bench-{uuid.uuid4().hex[:12]}"
        self._http = ""

    def why_not(self) -> str | None:
        probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lmcache') is None)"
        if self.python.exists() and not subprocess.run([self.python, "-c", probe], check=False).returncode:
            return None
        return "no environment with LMCache: `make setup-lmcache`, or --lmcache-python"

    def start(self) -> None:
        port, http_port = free_port(), free_port()
        self._http = f"http://127.0.0.1:{http_port}"
        command = [str(self.python), "-m", "lmcache.cli.main", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--http-host", "127.0.0.1", "--http-port", str(http_port), "--chunk-size", "64"]
        command += ["--l1-size-gb", "2", "--no-l1-use-lazy", "--eviction-policy", "LRU"]
        command += ["--supported-transfer-mode", "engine_driven", "--shm-name", self._memory, "--disable-observability"]
        command += ["--l2-adapter", json.dumps({"type": "fs", "base_path": str(self.stored)})]
        self._daemon = ChildProcess(command, {**os.environ, **self._environment()}, self.home / "daemon.log")
        self._daemon.await_answer(f"{self._http}/healthcheck", 120)
        # JSON is YAML.
        config = {"mp_host": "127.0.0.1", "mp_port": port}
        config["extra_config"] = {"lmcache.mp.mp_transfer_mode": "engine_driven"}
        (self.home / "lmcache.yaml").write_text(json.dumps(config))
        super().start()

    def stop(self) -> None:
        super().stop()
        if self._daemon is not None:
            self._daemon.terminate(timeout_s=10)
            self._daemon = None
        # The daemon should remove it, but it stays when the daemon is killed.
        for memory in Path("/dev/shm").glob(f"*{self._memory}"):
            memory.unlink(missing_ok=True)

    def forget(self) -> None:
        httpx.post(f"{self._http}/cache/clear", json={"tier": "l1"}, timeout=60).raise_for_status()
        super().forget()

    def _processes(self) -> list[ChildProcess]:
        return [*super()._processes(), *([] if self._daemon is None else [self._daemon])]

    def _flags(self) -> list[str]:
        return ["--enable-lmcache", "--lmcache-config-file", str(self.home / "lmcache.yaml")]

    def _environment(self) -> Mapping[str, str]:
        return {"LMCACHE_TRACK_USAGE": "false"}


SERVERS: tuple[type[Server], ...] = (RadixCache, FileLinkerServer, HiCache, LMCache)


def _install_plugin(directory: Path, function: str) -> None:
    """Make a plug-in for SGLang out of ``function``, for processes that have ``directory`` on their path."""
    info = directory / "agentstate_benchmark-1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: agentstate-benchmark\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\nagentstate_benchmark = {function}\n")
