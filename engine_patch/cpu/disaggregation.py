"""Prefill for an engine that decodes, on a CPU. SGLang has what it sends wait for CUDA's events after the forwards that
write it; here a forward is over when it returns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from engine_patch.cpu.unpinned import Unpinned


def install() -> None:
    """Let SGLang's scheduler of prefills do without events and pinned memory."""
    from sglang.srt.disaggregation import prefill

    prefill.torch = _Torch()


class _Over:
    """An event after work that is over."""

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


class _Torch(Unpinned):
    """torch, on whose GPU everything is over."""

    cuda = SimpleNamespace(Event=_Over, current_stream=lambda: None)
