"""LoRA adapters by what they are: the KV of a token depends on the adapter's weights, and not on its name or path.

SGLang puts an id of the adapter into the key of its radix tree. It is made of name and path for an adapter that the
command line names, and random for one that is loaded at run time: the first would find the pages of another adapter
once it has been trained again, the second none at all after a restart. Here its place is taken by a digest of what was
loaded.

What was loaded is what is in memory. SGLang maps an adapter's files, and reads them again whenever it brings the
adapter to the device: whoever writes over such a file changes an adapter that is loaded. So its tensors are copied,
once, and the digest is that of the copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from typing import Any, Protocol

import torch

_MARK = "|adapter:"
_DIGEST_BYTES = hashlib.sha256().digest_size
_NONCE_BYTES = 16
_LORA_ID_CHARACTERS = 32
# What ends like the key of a request with an adapter, with any number of the characters that tell it from one.
_LIKE_OURS = re.compile(re.escape(_MARK) + rf"[0-9a-f]{{{2 * _DIGEST_BYTES}}}\0*\Z")


class Cache(Protocol):
    """The radix cache of a rank. ``lora_names`` is SGLang's table of the names that its KV events tell, if any."""

    @property
    def lora_names(self) -> Any: ...

    def least_on_ranks(self, tensor: torch.Tensor) -> None: ...


class Adapters:
    """The adapters that a process has loaded, by SGLang's ids of them. For the scheduler's thread."""

    def __init__(self) -> None:
        # Of those that were loaded, not yet agreed on.
        self._loaded: dict[str, bytes] = {}
        self._digests: dict[str, str] = {}
        self._on = False

    def take(self, lora_id: str, adapter: Any) -> None:
        """SGLang has loaded an adapter (`LoRAAdapter`): copy its tensors, and compute the digest of it."""
        for weights in _tensors(adapter):
            weights.update({name: tensor.clone() for name, tensor in weights.items()})
        self._loaded[lora_id] = _digest(adapter)

    def agree(self, manager: Any, lora_ids: Iterable[str], cache: Cache) -> None:
        """Settle the digests of what was loaded, on all ranks alike, in the same step. ``manager`` is SGLang's
        `LoRAManager`, None for an engine without adapters. An adapter that differs between ranks, because its files
        were replaced while they loaded it, has a digest that is never found again."""
        self._on = True
        if manager is None:
            return
        for lora_id in lora_ids:
            own = self._loaded.pop(lora_id, bytes(_DIGEST_BYTES))
            adapter = manager.loras.get(lora_id)
            digest = _applied(own, adapter, manager) if adapter is not None else own
            # The least of a number and of its complement are the least and the greatest.
            parts = torch.tensor([*digest, *(255 - byte for byte in digest), *os.urandom(_NONCE_BYTES)])
            cache.least_on_ranks(parts)
            lowest, highest = bytes(parts[:_DIGEST_BYTES]), bytes(255 - parts[_DIGEST_BYTES : 2 * _DIGEST_BYTES])
            if lowest != highest:
                digest = hashlib.sha256(bytes(parts)).digest()
            self._digests[lora_id] = digest.hex()
            if adapter is not None and cache.lora_names is not None:
                # SGLang finds an adapter's name by the end of a key.
                named = manager.lora_refs[lora_id].lora_name
                cache.lora_names.register(lora_id=digest.hex()[-_LORA_ID_CHARACTERS:], lora_name=named)
        self._digests = {lora_id: digest for lora_id, digest in self._digests.items() if lora_id in manager.loras}

    def name(self, req: Any) -> None:
        """Give a request that SGLang has just made the ``extra_key`` under which its pages are kept: what the client
        sent, and the digest of its adapter. A client cannot send what would be the key of an adapter."""
        if not self._on:
            return
        if req.lora_id is None:
            req.extra_key = apart(req.extra_key)
        elif (digest := self._digests.get(req.lora_id)) is not None:
            req.extra_key = f"{(req.extra_key or '').removesuffix(req.lora_id)}{_MARK}{digest}"


LOADED = Adapters()
"""Those of this process: SGLang makes requests in many places, and tells none of them which engine it is."""


def applied_to(req: Any) -> str | None:
    """Which adapter a request of SGLang's is computed with, by its content, as `Adapters.name` has put it into the
    request's key: empty without one, None if that is not known."""
    if req.lora_id is None:
        return ""
    found = _LIKE_OURS.search(req.extra_key or "")
    return None if found is None else found[0]


def apart(extra_key: str | None) -> str | None:
    """What a client sent, changed if it reads like the key of a request with an adapter, and different for different
    keys."""
    return extra_key + "\0" if extra_key and _LIKE_OURS.search(extra_key) else extra_key


def _tensors(adapter: Any) -> list[dict[str, torch.Tensor]]:
    """Where an adapter keeps its tensors."""
    return [*(layer.weights for layer in adapter.layers), adapter.embedding_layers, adapter.added_tokens_embeddings]


def _digest(adapter: Any) -> bytes:
    digest = hashlib.sha256(json.dumps(adapter.config.hf_config, sort_keys=True, default=str).encode())
    for number, weights in enumerate(_tensors(adapter)):
        for name, tensor in sorted(weights.items()):
            digest.update(json.dumps([number, name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.digest()


def _applied(digest: bytes, adapter: Any, manager: Any) -> bytes:
    """The digest of an adapter as this engine applies it: of its tensors those whose modules it adapts
    (`--lora-target-modules`, or the modules of all adapters that it was started with)."""
    modules = sorted(manager.target_modules)
    names = sorted({name for weights in _tensors(adapter) for name in weights})
    applied = [max((module for module in modules if module in name), key=len, default=None) for name in names]
    shared = bool(getattr(manager, "experts_shared_outer_loras", False))
    return hashlib.sha256(digest + json.dumps([applied, shared]).encode()).digest()
