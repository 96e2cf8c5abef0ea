"""What turn 2 would take on other hardware: a model on paper that names its every assumption.

A prefill is bound by arithmetic: two operations a parameter and token, and causal attention, divided by the rate that
the engine reaches. A restore is bound by the slowest of drives, PCIe and memory; its layers run while later ones are
read, as in `agentstate.benchmarks.simulator`. A decoding step, and a forward of a few tokens, is bound by reading
weights and KV from device memory.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from agentstate.errors import SettingsError


@dataclass(frozen=True)
class Model:
    """A model's shape. ``parameters`` are those that a token goes through, ``weight_bytes`` all of them. Of its
    ``layers``, ``chunked_layers`` attend to the last ``chunk_tokens`` only; their KV is stored all the same."""

    name: str
    parameters: float
    weight_bytes: float
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    kv_element_bytes: int
    chunked_layers: int = 0
    chunk_tokens: int = 0

    @property
    def token_bytes(self) -> int:
        """KV of one token, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_element_bytes

    def prefill_operations(self, tokens: int) -> float:
        """Of a whole prompt: weights, and attention to everything before (half of it, on average)."""
        width = self.query_heads * self.head_dim
        reach = min(self.chunk_tokens, tokens) if self.chunked_layers else 0
        attention = 2 * width * ((self.layers - self.chunked_layers) * tokens**2 + self.chunked_layers * tokens * reach)
        return 2 * self.parameters * tokens + attention


@dataclass(frozen=True)
class Hardware:
    """One engine's. ``prefill_tflops`` is what a prefill reaches, not what the data sheet promises."""

    name: str
    prefill_tflops: float
    memory_gb_per_s: float
    pcie_gb_per_s: float
    drives_gb_per_s: float


@dataclass(frozen=True)
class Case:
    """A model and a context, with what LightInferra's makers published for it, if they did."""

    model: Model
    tokens: int
    published_recomputed_s: float | None = None
    published_restored_s: float | None = None


LLAMA_70B = Model("DeepSeek-R1-Distill-Llama-70B FP8", 70.6e9, 70.6e9, 80, 64, 8, 128, 1)
QWEN_7B = Model("Qwen2.5-7B-Instruct-1M", 7.6e9, 15.2e9, 28, 28, 4, 128, 2)
SCOUT = Model("Llama-4-Scout-17B-16E FP8", 17e9, 109e9, 48, 40, 8, 128, 1, chunked_layers=36, chunk_tokens=8192)
MODELS = {"llama-70b": LLAMA_70B, "qwen-7b": QWEN_7B, "llama-4-scout": SCOUT}

PUBLISHED = (
    Case(LLAMA_70B, 131_072, 70.8, 0.465),
    Case(QWEN_7B, 410_000, 72.6, 0.711),
    Case(QWEN_7B, 1_010_000, 372.3, 1.3),
    Case(SCOUT, 400_000, 103.0, 0.457),
)

NEW_TOKENS, OUTPUT_TOKENS = 64, 128
MEMORY_SHARE = 0.85
REQUEST_S = 0.03


def assumptions(hardware: Hardware) -> list[str]:
    """Everything that the figures rest on, a sentence each."""
    return [
        f"Hardware: {hardware.name}.",
        f"A prefill reaches {hardware.prefill_tflops:g} TFLOP/s at every length and in every number format. The four "
        "published recomputations come to 580, 550, 590 and 330 by the same count (`published_tflops`).",
        f"Device memory gives {MEMORY_SHARE:.0%} of {hardware.memory_gb_per_s:,g} GB/s.",
        f"Restoring runs at the smaller of {hardware.drives_gb_per_s:g} GB/s (all drives of one engine) and "
        f"{hardware.pcie_gb_per_s:g} GB/s (PCIe), from the moment the request arrives.",
        "Layers are equal, arrive evenly, and each runs as soon as it is there. Checksums and copies keep up.",
        f"Turn 2 adds {NEW_TOKENS} tokens and answers with {OUTPUT_TOKENS}; tokens a second are those of the answer "
        "over the time to first token and the decoding together.",
        f"A request takes {REQUEST_S:g} s beside the engine: HTTP, tokenizer, scheduler.",
        "All layers' KV is stored and restored, also of layers that attend to a chunk only.",
        "Weights and KV fit in device memory; nothing else runs.",
    ]


def published_tflops(case: Case) -> float | None:
    """The rate of a published recomputation by this count; None if none was published."""
    if case.published_recomputed_s is None:
        return None
    return case.model.prefill_operations(case.tokens) / case.published_recomputed_s / 1e12


def project(case: Case, hardware: Hardware) -> dict[str, Any]:
    """A row: what a case would take on this hardware, next to what was published for it."""
    model, tokens = case.model, case.tokens
    n_bytes = tokens * model.token_bytes
    memory_gb_per_s = hardware.memory_gb_per_s * MEMORY_SHARE
    step_s = (model.weight_bytes + n_bytes) / memory_gb_per_s / 1e9
    rate = hardware.prefill_tflops * 1e12
    total = tokens + NEW_TOKENS
    forward_s = max(step_s, (model.prefill_operations(total) - model.prefill_operations(tokens)) / rate)
    read_s = n_bytes / min(hardware.drives_gb_per_s, hardware.pcie_gb_per_s) / 1e9
    recomputed_s = REQUEST_S + model.prefill_operations(total) / rate
    restored_s = REQUEST_S + max(read_s + forward_s / model.layers, read_s / model.layers + forward_s)
    floor_s = REQUEST_S + forward_s
    decode_s = (OUTPUT_TOKENS - 1) * step_s
    return {
        "model": model.name,
        "tokens": tokens,
        "kv_bytes": n_bytes,
        "recomputed_s": round(recomputed_s, 3),
        "restored_s": round(restored_s, 3),
        "memory_hit_s": round(floor_s, 3),
        "ratio": round(recomputed_s / restored_s, 1),
        "tokens_per_s_recomputed": round(OUTPUT_TOKENS / (recomputed_s + decode_s), 2),
        "tokens_per_s_restored": round(OUTPUT_TOKENS / (restored_s + decode_s), 2),
        "published_recomputed_s": case.published_recomputed_s,
        "published_restored_s": case.published_restored_s,
    }


def measured_tflops(model: Model, tokens: int, tokens_per_s: float) -> float:
    """The rate of a prefill of ``tokens`` that was measured in tokens a second."""
    return model.prefill_operations(tokens) * tokens_per_s / tokens / 1e12


def load_cases(path: Path) -> list[Case]:
    """Cases from a JSON list of objects: the fields of `Model`, and ``tokens``. Raises SettingsError."""
    names = {field.name for field in fields(Model)}
    try:
        items = json.loads(path.read_text())
        return [
            Case(Model(**{name: value for name, value in item.items() if name in names}), int(item["tokens"]))
            for item in items
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        example = {**asdict(QWEN_7B), "tokens": 131_072}
        raise SettingsError(f"{path} is not a list of models like [{json.dumps(example)}]: {error!r}") from error
