"""Models with the KV geometry of a published one and almost no weights, so that bytes and not arithmetic dominate.

Run in the engine's environment: ``python -m agentstate.benchmarks.models NAME DIRECTORY``. The weights are random, from
a fixed seed, and drawn wider than a model is initialised with, so that attention decides the next token. There is no
tokenizer, since requests are sent as token ids.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class GeometryModel:
    """``layers`` layers with ``kv_heads`` KV heads of ``head_size``, as the published model has them."""

    layers: int
    kv_heads: int
    head_size: int

    def token_bytes(self, item_bytes: int) -> int:
        """KV of a token, in bytes, when a number takes ``item_bytes``."""
        return 2 * self.layers * self.kv_heads * self.head_size * item_bytes


GEOMETRIES = {
    "qwen2.5-7b": GeometryModel(28, 4, 128),
    "llama-70b": GeometryModel(80, 8, 128),
    # Its layers with chunked attention keep only a window; here all of them keep everything.
    "llama-4-scout": GeometryModel(48, 8, 128),
}
VOCABULARY_SIZE = 40_960
_HIDDEN = 64


def build(name: str, directory: Path, max_context: int = 131_072) -> None:
    """Write the checkpoint of `GEOMETRIES` ``name``, with one query head a KV head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    geometry = GEOMETRIES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=_HIDDEN,
        intermediate_size=_HIDDEN,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.kv_heads,
        num_key_value_heads=geometry.kv_heads,
        head_dim=geometry.head_size,
        max_position_embeddings=max_context,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    directory.mkdir(parents=True, exist_ok=True)
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]))
