"""A network of two machines on one: a namespace behind a link whose bandwidth can be set. Linux, as root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from agentstate.errors import SettingsError

# What a link may send at once, and how much waits for it before packets are dropped.
_BURST_BYTES, _QUEUE_MS = 1 << 20, 200


class Link:
    """``within`` runs a command in the namespace ``name``, where this machine finds it at ``address``; from there this
    machine is at ``here``, and all of its other addresses can be reached too."""

    def __init__(self, name: str, subnet: str):
        self.name = name
        self.address, self.here = f"{subnet}.2", f"{subnet}.1"
        self.within = ("ip", "netns", "exec", name)

    def limit(self, bits_per_s: float | None) -> None:
        """Let that much pass, each way; None: all that this machine can."""
        for prefix, device in (((), f"{self.name}-a"), (self.within, f"{self.name}-b")):
            if bits_per_s is None:
                with suppress(SettingsError):
                    _run([*prefix, "tc", "qdisc", "del", "dev", device, "root"])
                continue
            shape = ["tbf", "rate", f"{bits_per_s:.0f}bit", "burst", str(_BURST_BYTES), "latency", f"{_QUEUE_MS}ms"]
            _run([*prefix, "tc", "qdisc", "replace", "dev", device, "root", *shape])

    def cut(self) -> None:
        """Let nothing pass, and tell nobody: connections stay as they are."""
        _run(["ip", "link", "set", f"{self.name}-a", "down"])

    def mend(self) -> None:
        _run(["ip", "link", "set", f"{self.name}-a", "up"])


@contextmanager
def link(number: int = 0) -> Iterator[Link]:
    """One of several, by ``number``. Raises SettingsError where this machine does not let a process make one."""
    if os.geteuid() or shutil.which("ip") is None or shutil.which("tc") is None:
        raise SettingsError("a link that can be limited needs root, ip and tc: run it as root, with iproute2 installed")
    name, subnet = f"as{os.getpid() % 1_000_000}{number}", f"10.{213 + number}.{os.getpid() % 250}"
    _run(["ip", "netns", "add", name])
    try:
        _run(["ip", "link", "add", f"{name}-a", "type", "veth", "peer", "name", f"{name}-b", "netns", name])
        _run(["ip", "addr", "add", f"{subnet}.1/24", "dev", f"{name}-a"])
        _run(["ip", "link", "set", f"{name}-a", "up"])
        within = ["ip", "netns", "exec", name]
        _run([*within, "ip", "addr", "add", f"{subnet}.2/24", "dev", f"{name}-b"])
        for device in (f"{name}-b", "lo"):
            _run([*within, "ip", "link", "set", device, "up"])
        _run([*within, "ip", "route", "add", "default", "via", f"{subnet}.1"])
        yield Link(name, subnet)
    finally:
        with suppress(SettingsError):
            _run(["ip", "link", "del", f"{name}-a"])
        _run(["ip", "netns", "del", name])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SettingsError(f"{' '.join(command)}: {done.stderr.strip()}")
