from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from agentstate.cli import local

ASK = """
from agentstate.cli import local
local._PORTS = range({port}, {port} + 1)
try:
    print(local.free_port())
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, a port is only looked for")
def test_a_port_is_for_who_got_it_first_also_while_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    port = local.free_port()

    def asked_elsewhere() -> str:
        command = [sys.executable, "-c", ASK.format(port=port)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(local, "_PORTS", range(port, port + 1))
    with pytest.raises(RuntimeError, match="no ports are free"):
        local.free_port()
    assert asked_elsewhere() == "no ports are free"
    # A server can listen there, and again when it has ended.
    for _ in range(2):
        with socket.create_server(("127.0.0.1", port)) as server, socket.create_connection(("127.0.0.1", port)):
            server.accept()[0].close()
    assert asked_elsewhere() == "no ports are free"
