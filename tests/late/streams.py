"""Streams and events: what is queued is done in its stream's order, and not before anybody must have it."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from late.device import LateDevice


class Policy(NamedTuple):
    """When queued work is done. ``late``: when the host, or another stream that must go on, waits for it. ``random``:
    in any order that streams and events allow, decided by ``seed``. ``eager``: at once."""

    name: str
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> Policy:
        """``late``, ``eager``, ``random`` or ``random:SEED``. Raises ValueError for anything else."""
        name, _, seed = text.partition(":")
        if name not in ("late", "random", "eager"):
            raise ValueError(f"no policy of the late device: {text!r}")
        return cls(name, int(seed or 0))

    def __str__(self) -> str:
        return f"{self.name}:{self.seed}" if self.name == "random" else self.name


@dataclass
class Marker:
    """A point in a stream. It is passed when all work before it is done."""

    stream: LateStream
    passed: bool = False


@dataclass
class Wait:
    """Work after it is not begun before the marker is passed."""

    marker: Marker


Work = Callable[[], object]


class Timeline:
    """Does the work of all streams of a device, in the thread that waits for it. Thread-safe.

    With `random`, the order also depends on how threads queue: one seed is not one order. Every order that comes about
    is one that an accelerator may choose.
    """

    # How many steps are made ahead of need, each time something is queued or waited for.
    _STEPS_AHEAD = (0, 0, 1, 2, 5)

    def __init__(self, policy: Policy):
        self.policy = policy
        self.lock = threading.RLock()
        self.streams: list[LateStream] = []
        self._random = random.Random(policy.seed)

    def put(self, stream: LateStream, item: Work | Marker | Wait) -> None:
        with self.lock:
            stream.queued.append(item)
            self.advance()

    def advance(self) -> None:
        """Do what the policy does without being asked."""
        with self.lock:
            if self.policy.name == "eager":
                for stream in self.streams:
                    self.drain(stream)
            elif self.policy.name == "random":
                for _ in range(self._random.choice(self._STEPS_AHEAD)):
                    if not (able := [stream for stream in self.streams if _able(stream)]):
                        return
                    _step(self._random.choice(able))

    def reach(self, marker: Marker) -> None:
        """Do what is queued before ``marker``, and nothing that need not be done for that."""
        with self.lock:
            self.advance()
            self._do_before(marker)

    def drain(self, stream: LateStream) -> None:
        with self.lock:
            while stream.queued:
                self._go_on(stream)

    def _do_before(self, marker: Marker) -> None:
        # Nothing is queued before a marker that is not passed when the device has broken in between.
        while not marker.passed and marker.stream.queued:
            self._go_on(marker.stream)

    def _go_on(self, stream: LateStream) -> None:
        first = stream.queued[0]
        if isinstance(first, Wait):
            self._do_before(first.marker)
        _step(stream)


def _able(stream: LateStream) -> bool:
    return bool(stream.queued) and not (isinstance(stream.queued[0], Wait) and not stream.queued[0].marker.passed)


def _step(stream: LateStream) -> None:
    item = stream.queued.popleft()
    if isinstance(item, Marker):
        item.passed = True
    elif not isinstance(item, Wait):
        item()


class LateStream:
    """Stands for `torch.cuda.Stream`."""

    def __init__(self, device: LateDevice, torch_device: torch.device | None = None, priority: int = 0):
        device.require("stream")
        self.late_device = device
        self.device = device.torch_device
        self.queued: deque[Work | Marker | Wait] = deque()
        with device.timeline.lock:
            device.timeline.streams.append(self)

    def wait_event(self, event: LateEvent) -> None:
        self.late_device.require("wait")
        if event.marker is not None:
            self.late_device.timeline.put(self, Wait(event.marker))

    def wait_stream(self, stream: LateStream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: LateEvent | None = None) -> LateEvent:
        event = event or LateEvent(self.late_device)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.late_device.require("synchronize")
        self.late_device.timeline.advance()
        self.late_device.timeline.drain(self)

    def query(self) -> bool:
        self.late_device.timeline.advance()
        return not self.queued


class LateEvent:
    """Stands for `torch.cuda.Event`. One that was never recorded has happened."""

    def __init__(self, device: LateDevice, enable_timing: bool = False, **options: bool):
        if device.torch_device.type != "cuda" and options:
            raise TypeError(f"Event() got unexpected keyword arguments {sorted(options)}")
        self.marker: Marker | None = None
        self.late_device = device

    def record(self, stream: LateStream | None = None) -> None:
        self.late_device.require("record")
        self.marker = Marker(stream or self.late_device.current_stream)
        self.late_device.timeline.put(self.marker.stream, self.marker)

    def wait(self, stream: LateStream | None = None) -> None:
        (stream or self.late_device.current_stream).wait_event(self)

    def synchronize(self) -> None:
        self.late_device.require("synchronize")
        if self.marker is not None:
            self.late_device.timeline.reach(self.marker)

    def query(self) -> bool:
        self.late_device.timeline.advance()
        return self.marker is None or self.marker.passed
