"""What a page is valid for, as 32 bytes.

Page keys cover the tokens and the namespace of a request and nothing else; the same tokens under other weights,
another KV dtype or another parallel shape have different KV. Whatever changes a page's bytes, or how they are laid
out, goes into its fingerprint, and a store serves one fingerprint only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from agentstate.errors import SettingsError
from agentstate.pages.extent import FORMAT_VERSION

_SAMPLE_BYTES = 4096
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_CONFIG_NAMES = ("config.json", "quantize_config.json", "hf_quant_config.json")


def fingerprint(**fields: Any) -> bytes:
    """SHA-256 over ``fields``, which must be JSON values, and the format version. Order does not matter."""
    text = json.dumps({**fields, "format": FORMAT_VERSION}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def weights_digest(checkpoint: Path) -> str:
    """A digest of a checkpoint, a directory or one file, that reads megabytes of it, not gigabytes.

    Covers the model's configuration files whole; of every safetensors file its name, its size, its header (every
    tensor's name, dtype, shape and place) and 4 KiB from the beginning, the middle and the end of every tensor; of
    any other weight file its name, its size and 64 samples spread over it. Training changes all of a tensor that it
    changes, so fine-tunes of one model differ. Not promised: that checkpoints made to differ between the samples are
    told apart. Tokenizer files do not count: pages are keyed by token ids. Raises SettingsError if no weight file
    is found.
    """
    files = [checkpoint] if checkpoint.is_file() else sorted(checkpoint.glob("*"))
    weights = [path for path in files if path.suffix in _WEIGHT_SUFFIXES and path.is_file()]
    if not weights:
        raise SettingsError(f"no model weights in {checkpoint}: cannot tell which model its KV pages belong to")
    digest = hashlib.sha256()
    for name, content in configuration(checkpoint).items():
        digest.update(f"{name}\0".encode() + content)
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for start, length in _samples(file, size):
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()


def configuration(checkpoint: Path) -> dict[str, bytes]:
    """The model's configuration files, by name."""
    paths = [checkpoint / name for name in _CONFIG_NAMES]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def tensor_names(checkpoint: Path) -> set[str]:
    """The names of all tensors in a checkpoint's safetensors files; empty if it has weights of another kind. Raises
    SettingsError if a file is damaged."""
    files = [path for path in sorted(checkpoint.glob("*")) if path.suffix in _WEIGHT_SUFFIXES]
    if any(path.suffix != ".safetensors" for path in files):
        return set()
    names: set[str] = set()
    for path in files:
        with path.open("rb") as file:
            names |= _header(file, path.stat().st_size)[0].keys()
    return names


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The tensors of a safetensors file by name, and where the first of them begins. Raises SettingsError where it is
    none, or not all there."""
    header_bytes = int.from_bytes(file.read(8), "little")
    try:
        tensors = json.loads(file.read(min(header_bytes, size)))
        found = {name: tensor["data_offsets"] for name, tensor in tensors.items() if name != "__metadata__"}
        missing = 8 + header_bytes + max((end for _, end in found.values()), default=0) - size
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SettingsError(f"{file.name} is not a safetensors file") from None
    if missing > 0:
        raise SettingsError(f"{file.name} ends {missing:,} bytes too early: it is damaged, or still being copied")
    return found, 8 + header_bytes


def _samples(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """Offsets and lengths, in bytes, of the samples that stand for a weight file."""
    if Path(file.name).suffix != ".safetensors":
        yield from ((max(0, (size - _SAMPLE_BYTES) * i // 63), _SAMPLE_BYTES) for i in range(64))
        return
    # Read the whole header first: whoever takes a sample moves the file's position.
    spans, base = _header(file, size)
    yield 0, base
    for start, end in sorted(spans.values()):
        length = min(_SAMPLE_BYTES, end - start)
        for offset in (start, (start + end - length) // 2, end - length):
            yield base + offset, length
