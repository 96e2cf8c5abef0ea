"""Run with the packages of the last release on the path: does what the lines on its input say, and answers each with a
line on its output. An engine rank without an engine."""

from __future__ import annotations

import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

from agentstate import engines
from agentstate.database import Database
from agentstate.manifests import Manifest
from agentstate.pages import PageStore
from agentstate.pages.testing.pages import MHA, expected, keys, read, reader_for, write
from engine_patch.catalog import Catalog
from engine_patch.control import ControlEndpoint

MARK = b"m" * 32


class Rank:
    def __init__(self, url: str):
        self.database = Database(url)
        self.saved = threading.Event()
        self.lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("engine_patch").addHandler(handler)

    def upgrade(self) -> None:
        self.database.upgrade()

    def start(self) -> str:
        self.endpoint = ControlEndpoint(
            "tcp://127.0.0.1:*",
            standing=lambda session: {"state": "durable", "tokens": 128, "pages": 2, "bytes": 2000},
            stat=lambda: {"rank": 0},
            prefetch=lambda session, tier, keys: lambda: {"state": "warm", "tokens": 128, "tier": tier},
            demote=lambda session: {"state": "demoted"},
            spill=lambda on: {"state": "on"},
            tick=lambda: None,
        )
        base_url = "http://127.0.0.1:30000/v1"
        self.engine = engines.Engine("eng_old", "n1", 0, self.endpoint.address, base_url, "m", "f1", "/pages")
        self.catalog = Catalog(
            self.database,
            self.engine,
            0.05,
            saved=lambda manifest: self.saved.set(),
            needed=list,
            stored=len,
            lost=int,
            n_bytes=int,
        )
        return self.endpoint.address

    def save(self, session: str) -> bool:
        """A manifest of two pages. Whether it is in SQL."""
        self.saved.clear()
        self.catalog.save(Manifest(session, "f1", 0, "n1", "eng_old", 64, 128, b"k" * 64, 2000))
        return self.saved.wait(60)

    def said(self) -> list[str]:
        """What was logged since the start, once there is anything."""
        while not self.lines:
            threading.Event().wait(0.05)
        return self.lines

    def write(self, directory: str, *names: str) -> None:
        store = PageStore(Path(directory), MARK, MHA)
        write(store, keys(*names))
        store.close()

    def right(self, directory: str, *names: str) -> bool:
        """Whether the pages are there, each with its bytes."""
        store, reader = PageStore(Path(directory), MARK, MHA), reader_for(MHA)
        with store.hold(keys(*names)) as hold:
            found = read(reader, [hold]) == expected(MHA, [hold]) and len(hold.keys) == len(names)
        reader.close()
        store.close()
        return found

    def close(self) -> None:
        self.catalog.close()
        self.endpoint.close()


def main() -> None:
    rank = Rank(sys.argv[1])
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        answer: Any = getattr(rank, verb)(*arguments)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
