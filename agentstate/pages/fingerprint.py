"""What a page is valid for, as 32 bytes.

Page keys cover the tokens and the namespace of a request and nothing else; the same tokens under other weights,
another KV dtype or another parallel shape have another KV. Whatever changes a page's bytes, or how they are laid
out, goes into its fingerprint, and a store serves one fingerprint only.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from agentstate.errors import SettingsError
from agentstate.pages.extent import FORMAT_VERSION

_SAMPLE_BYTES = 1 << 20
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_CONFIG_NAMES = ("config.json", "quantize_config.json", "hf_quant_config.json")


def fingerprint(**fields: Any) -> bytes:
    """SHA-256 over ``fields``, which must be JSON values, and the format version. Order does not matter."""
    text = json.dumps({**fields, "format": FORMAT_VERSION}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def weights_digest(checkpoint: Path) -> str:
    """A digest of a checkpoint, a directory or one file, that costs megabytes of reading, not gigabytes.

    Covers the model's configuration files whole, and of every weight file its name, its size, its first mebibyte
    (where safetensors keeps every tensor's name, dtype, shape and place) and mebibytes sampled at its middle and its
    end. Not promised: that two checkpoints of equal shape which differ only between the samples are told apart.
    Tokenizer files do not count: pages are keyed by token ids. Raises SettingsError where no weight file is found.
    """
    files = [checkpoint] if checkpoint.is_file() else sorted(checkpoint.glob("*"))
    weights = [path for path in files if path.suffix in _WEIGHT_SUFFIXES and path.is_file()]
    if not weights:
        raise SettingsError(f"no model weights in {checkpoint}: cannot tell which model its KV pages belong to")
    digest = hashlib.sha256()
    for name in _CONFIG_NAMES:
        if (checkpoint / name).is_file():
            digest.update(f"{name}\0".encode() + (checkpoint / name).read_bytes())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for offset in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
