"""Imported by a zygote: an engine of these tests that has nothing to do leaves the cores to others. SGLang's scheduler
looks for requests without a pause, and several engines share two cores here."""

from __future__ import annotations

import time
from typing import Any

from sglang.srt.managers.scheduler import Scheduler

PAUSE_S = 0.002

_on_idle = Scheduler.on_idle


def on_idle(self: Any) -> None:
    _on_idle(self)
    time.sleep(PAUSE_S)


Scheduler.on_idle = on_idle
