"""What the KV of a request was computed with, told by the engine that prefills to the one that decodes.

SGLang compares the two engines' layouts, and nothing else: not their weights, adapters, flags or tokens. What is
received would be stored under the fingerprint of whoever receives it. So a mark of these goes with every request, in
its own metadata: it arrives with the request's KV, and holds through restarts and updates of weights on either side.
It lies in what SGLang leaves of the row that names the request's room, which both engines have in any case.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine_patch import adapters

logger = logging.getLogger(__name__)

MARK_BYTES = hashlib.sha256().digest_size
NONE = bytes(MARK_BYTES)
"""In place of a mark: of an engine without AgentState, or one that vouches for nothing."""
# The room itself, which SGLang compares.
_ROOM_BYTES = 8

_SILENT = (
    "an engine that prefills does not say what it computes with, and what it sends is not stored here: start it with "
    "--radix-cache-backend agentstate; if it is, `agentstate engines show` says why it stores nothing"
)
_UNLIKE = (
    "an engine that prefills computes with other weights, adapters, flags or tokens than this one, and what it sends "
    "is not stored here: start both with the same"
)


@dataclass
class ReceivedStats:
    """Of requests that were prefilled elsewhere: all ``requests``, and of these the ones that are not stored, because
    the engine that has prefilled them says nothing (``silent``) or computes something else (``unlike``)."""

    requests: int = 0
    silent: int = 0
    unlike: int = 0


def mark(fingerprint: bytes | None, req: Any, *tokens: Sequence[int]) -> bytes:
    """The mark, 32 bytes, of what a rank with this ``fingerprint`` computes for a request (SGLang's) of these
    ``tokens``, one part after another; `NONE` where the rank has none, or the request's adapter is not known by its
    content. Ranks of two engines have the same where they hold the same part of the same KV."""
    adapter = adapters.applied_to(req)
    if fingerprint is None or adapter is None:
        return NONE
    digest = hashlib.sha256(fingerprint + len(adapter).to_bytes(8, "little") + adapter.encode())
    for part in tokens:
        digest.update(np.asarray(part, dtype=np.int64).tobytes())
    return digest.digest()


def write(buffers: Any, index: int, found: bytes) -> None:
    """Put a mark into the row ``index`` of SGLang's `MetadataBuffers`."""
    row = _row(buffers, index)
    if len(row) == MARK_BYTES:
        row.copy_(torch.frombuffer(bytearray(found), dtype=torch.uint8))


def read(buffers: Any, index: int) -> bytes:
    """The mark that has arrived in the row ``index``; `NONE` where SGLang leaves no room for one."""
    row = _row(buffers, index)
    return bytes(row.tolist()) if len(row) == MARK_BYTES else NONE


def _row(buffers: Any, index: int) -> torch.Tensor:
    return buffers.bootstrap_room[index].view(torch.uint8)[_ROOM_BYTES : _ROOM_BYTES + MARK_BYTES]


class Received:
    """Counts what an engine that decodes is sent, and warns once of either reason not to store it."""

    def __init__(self) -> None:
        self.stats = ReceivedStats()

    def add(self, *, like: bool, silent: bool) -> None:
        """A request has arrived: whether its KV is ``like`` what this engine computes, and, if it is not, whether the
        other one is ``silent`` about it."""
        self.stats.requests += 1
        if like:
            return
        if silent:
            self.stats.silent += 1
        else:
            self.stats.unlike += 1
        if (self.stats.silent if silent else self.stats.unlike) == 1:
            logger.warning("agentstate: %s", _SILENT if silent else _UNLIKE)
