"""Many processes that want one session: some lose their lease, some are killed, and the transcript stays whole.

``AGENTSTATE_TEST_CONCURRENCY_S`` is how long they go on, on each database.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from stage import MODEL, Service

SECONDS = float(os.environ.get("AGENTSTATE_TEST_CONCURRENCY_S", "6"))
WRITERS = 16
WORKER = Path(__file__).with_name("worker.py")


def records_of(logs: list[Path]) -> list[dict[str, Any]]:
    """What the writers have said; the last line of one that was killed may lack its end."""
    return [json.loads(line) for log in logs for line in log.read_text().splitlines(keepends=True) if line[-1] == "\n"]


def seen_enough(logs: list[Path]) -> bool:
    records = records_of(logs)
    appended = [record for record in records if "appended" in record]
    return len(appended) >= 20 and len(records) > len(appended) and len({one["epoch"] for one in appended}) >= 3


@pytest.mark.timeout(SECONDS + 1800)
def test_sixteen_writers_of_one_session(service: Service, tmp_path: Path) -> None:
    session = service.client.create_session(MODEL)
    logs = [tmp_path / f"{number}.log" for number in range(WRITERS)]
    end = tmp_path / "end"
    port = service.base_url.rpartition(":")[2]

    def start(number: int) -> subprocess.Popen[bytes]:
        # -S -E: nothing is needed but the standard library, and sixteen interpreters start at once.
        command = [sys.executable, "-S", "-E", str(WORKER), port, session.id, str(logs[number]), str(end)]
        return subprocess.Popen(command, stderr=subprocess.PIPE)

    writers = [start(number) for number in range(WRITERS)]
    killed = 0
    dice = random.Random(7)
    while not all(log.exists() for log in logs):
        time.sleep(0.05)
    until_s = time.monotonic() + SECONDS
    # However busy the machine, it goes on until there is something to look at.
    while time.monotonic() < until_s or killed < 5 or not seen_enough(logs):
        time.sleep(SECONDS / 12)
        victim = dice.randrange(WRITERS)
        writers[victim].kill()
        writers[victim].wait()
        killed += 1
        writers[victim] = start(victim)
    end.touch()
    for writer in writers:
        _, errors = writer.communicate()
        assert writer.returncode == 0, errors.decode()

    records = records_of(logs)
    acknowledged = [tag for record in records for tag in record.get("appended", ())]
    executed = Counter(record["executed"] for record in records if "executed" in record)
    entries = []
    after = None
    while True:
        page = service.client.entries(session.id, after=after, limit=1000)
        entries += page.data
        after = page.last_id
        if not page.has_more:
            break
    stored = [entry.payload["tag"] for entry in entries if entry.kind == "note"]
    assert killed >= 5
    assert len(acknowledged) >= 20, "they did get to write"
    assert len(set(acknowledged)) == len(acknowledged)
    assert set(acknowledged) <= set(stored), "nothing that was acknowledged is lost"
    assert len(set(stored)) == len(stored), "nothing is there twice"
    assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1)), "no gaps"
    assert [entry.parent_id for entry in entries[1:]] == [entry.id for entry in entries[:-1]]
    # One holder at a time: the epochs of what was appended only grow, and each belongs to one process.
    epochs = [entry.payload["epoch"] for entry in entries if entry.kind == "note"]
    assert epochs == sorted(epochs)
    holders: dict[int, set[str]] = {}
    for entry in entries:
        if entry.kind == "note":
            holders.setdefault(entry.payload["epoch"], set()).add(entry.payload["tag"].partition(".")[0])
    assert all(len(processes) == 1 for processes in holders.values())
    assert len(holders) >= 3, "the lease was taken over"
    # Both entries of one append, next to each other.
    tags = [entry.payload["tag"] for entry in entries if entry.kind == "note"]
    assert all(first[:-1] == second[:-1] for first, second in zip(tags[::2], tags[1::2], strict=True))
    # Tool calls: each executed at most once, whatever became of who claimed it.
    assert executed, "tools were executed"
    assert max(executed.values()) == 1
    calls = Counter(entry.call_id for entry in entries if entry.kind == "tool_call")
    assert max(calls.values()) == 1
    assert set(executed) <= set(calls)
