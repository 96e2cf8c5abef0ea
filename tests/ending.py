"""How what a test has started ends: orderly, and without long waits where the test has failed. Such a test may hold
what would be waited for: it did not come to set an event, or to close a stream."""

from __future__ import annotations

import faulthandler
import sys
import threading

PATIENCE_S = 300
"""How long what was told to end may take."""

AFTER_FAILURE_S = 20
"""The same after a test that has failed."""

failed = False
"""Whether the test that runs has failed. Said by conftest.py, and by who starts something for a part of a test."""

left_behind: list[str] = []
"""What did not end: this process has to be ended hard, since an interpreter waits for threads."""


def join(thread: threading.Thread, what: str) -> None:
    """Wait for a thread, a daemon, that was told to end. If it does not, print what all threads do, and leave it
    behind. Raises AssertionError then, unless the test has failed already."""
    thread.join(AFTER_FAILURE_S if failed else PATIENCE_S)
    if not thread.is_alive():
        return
    left_behind.append(what)
    said = f"{what} was told to end and goes on"
    print(f"{said}; what all threads do:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(2)
    assert failed, said
