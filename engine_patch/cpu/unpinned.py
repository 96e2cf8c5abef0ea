"""torch for modules of SGLang that pin tensors in host memory, which needs a GPU: here they are ordinary ones."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch


class Unpinned(ModuleType):
    """torch, whose functions do not know ``pin_memory``."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("empty", "tensor", "zeros"):
            return found

        @functools.wraps(found)
        def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
            return found(*args, **kwargs)

        return unpinned
