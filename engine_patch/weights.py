"""What becomes of stored pages when weights are loaded into a running engine.

Pages are valid for the weights that they were computed with. SGLang says whether an update succeeded, but not what is
in the model after one that failed half-way: its way back loads from the path that has just failed. So whatever is in
doubt leaves the engine without a store, until it is restarted.
"""

from __future__ import annotations

from enum import Enum, auto
from pathlib import Path
from typing import Any

# What helps an engine whose weights are in doubt.
RESTART = "restart it to store pages again"
# SGLang's, of failures before the first tensor is loaded.
_UNTOUCHED = ("Failed to get weights iterator", "Failed to get model loader")


class Weights(Enum):
    """What is in the model after an update from disk."""

    SAME = auto()
    OF_FILES = auto()
    IN_DOUBT = auto()


def after_update(request: Any, output: Any) -> Weights:
    """``request`` and ``output`` are SGLang's. Files that are loaded say what the model is only when the device cache
    was flushed: otherwise the tree still has pages of the weights before."""
    if not output.success:
        return Weights.SAME if output.message.startswith(_UNTOUCHED) else Weights.IN_DOUBT
    return Weights.OF_FILES if request.flush_cache else Weights.IN_DOUBT


def damage(request: Any) -> str | None:
    """What is wrong with the files of an update from disk, as far as their headers tell; None where nothing is known.

    SGLang would notice in the middle of loading them, load them once more to take that back, and end. What it looks for
    on the hub, or does not load from files, is its own affair.
    """
    # Late: every process of SGLang loads this module.
    from agentstate.pages import tensor_names

    try:
        checkpoint = Path(request.model_path)
        if request.load_format in (None, "auto", "safetensors") and checkpoint.is_dir():
            tensor_names(checkpoint)
    except Exception as error:
        # Whatever it is: all ranks are to hear of it.
        return str(error) or repr(error)
    return None


def are_lost(tags: list[str] | None, server_args: Any) -> bool:
    """Whether a release of the device memory of ``tags``, all when there are none, leaves weights behind that are not
    brought back."""
    released = not tags or "weights" in tags
    return released and bool(server_args.enable_memory_saver) and not server_args.enable_weights_cpu_backup
