"""One of several processes that want to run the same session: what `test_concurrency` starts, and kills.

It appends what it writes to a file of its own, after a service has acknowledged it, so that the test can compare. Where
a service is gone it asks the next one; what was not answered may have been done or not.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

LEASE_TTL_S = 0.5


UNKNOWN = (0, 503)
"""No answer, and the database's."""


class Session:
    """The services as one process sees them. The standard library's client, because it is there at once."""

    def __init__(self, ports: list[int], session_id: str):
        self._ports = ports
        self._path = f"/v1/sessions/{session_id}"
        self._connect()

    def _connect(self) -> None:
        self._ports = [*self._ports[1:], self._ports[0]]
        self._http = http.client.HTTPConnection("127.0.0.1", self._ports[0], timeout=60)

    def send(self, method: str, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        try:
            self._http.request(method, self._path + path, json.dumps(body), {"Content-Type": "application/json"})
            response = self._http.getresponse()
            return response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException):
            self._http.close()
            self._connect()
            return 0, {}


def main(ports: list[int], session_id: str, log_path: str, end: Path) -> None:
    session = Session(ports, session_id)
    number = 0
    with open(log_path, "a") as log:

        def say(**record: Any) -> None:
            log.write(json.dumps(record) + "\n")
            log.flush()

        while not end.exists():
            status, turn = session.send("POST", "/resume", lease_ttl_s=LEASE_TTL_S, tail=0)
            if status != 200:
                assert status == 409 or status in UNKNOWN, turn
                time.sleep(0.15)
                continue
            lease = {"token": turn["lease"]["token"], "epoch": turn["lease"]["epoch"]}
            for step in range(5):
                number += 1
                tags = [f"{os.getpid()}.{number}.{part}" for part in "ab"]
                entries = [{"kind": "note", "payload": {"tag": tag, "epoch": lease["epoch"]}} for tag in tags]
                status, appended = session.send("POST", "/entries", lease=lease, entries=entries)
                if status == 409 or status in UNKNOWN:
                    break
                assert status == 201, appended
                say(appended=tags, epoch=lease["epoch"])
                call_id = f"call_{lease['epoch'] // 3}"  # several holders after each other want the same call
                status, call = session.send("PUT", f"/tool-calls/{call_id}", lease=lease, name="charge")
                if status == 201:
                    say(executed=call_id)  # the tool: what must not be done twice
                    status, call = session.send("PUT", f"/tool-calls/{call_id}/result", lease=lease, output=1)
                assert status in (200, 409, *UNKNOWN), call
                if step == 2 and lease["epoch"] % 4 == 0:
                    time.sleep(LEASE_TTL_S * 1.5)  # it lapses and is taken over while this one still believes in it
            else:
                session.send("POST", "/suspend", lease=lease, reason="tool_wait", durable_timeout_ms=0)


if __name__ == "__main__":
    main([int(port) for port in sys.argv[1].split(",")], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
