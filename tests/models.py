"""Tiny checkpoints with random weights, one of each kind of KV pool: `python tests/models.py DIRECTORY` makes them
all, `python tests/models.py DIRECTORY KIND` one of them, `python tests/models.py DIRECTORY adapter-1` a LoRA adapter of
the kind "llama": another number, another adapter.

Runs in the engine's environment, which has torch and transformers. Weights are drawn wider than a model is initialised
with, so that what is attended to decides the next token, and a wrong page shows in the output.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from agentstate.benchmarks import drafting
from agentstate.benchmarks.drafting import COMMON, VOCABULARY

KINDS = ("llama", "mla", "sliding", "all_sliding", "conv", *drafting.KINDS)
WINDOW = 128  # tokens that a sliding layer sees: two pages
_SEED = 20


def save(kind: str, directory: Path) -> None:
    """Write a checkpoint of one of `KINDS`: a few megabytes, float32, without a tokenizer."""
    import torch
    import transformers as hf

    if kind in drafting.KINDS:
        drafting.save(kind, directory)
        return
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    match kind:
        case "llama":
            config = hf.LlamaConfig(num_hidden_layers=4, head_dim=32, **COMMON)
        case "mla":
            latent = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
            routed = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_layer_freq": 1}
            routing = {"n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax"}
            yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "rope_theta": 1e4}
            config = hf.DeepseekV2Config(
                num_hidden_layers=3,
                q_lora_rank=None,
                moe_intermediate_size=64,
                first_k_dense_replace=1,
                rope_parameters=yarn | {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1},
                **latent,
                **routed,
                **routing,
                **COMMON | {"num_key_value_heads": 4},
            )
        case "sliding" | "all_sliding":
            layers = ["sliding_attention"] * 3 + ["full_attention" if kind == "sliding" else "sliding_attention"]
            config = hf.MellumConfig(
                num_hidden_layers=4, head_dim=32, sliding_window=WINDOW, layer_types=layers, **experts, **COMMON
            )
        case "conv":
            layers = ["conv", "conv", "full_attention", "conv"]
            config = hf.Lfm2Config(num_hidden_layers=4, layer_types=layers, conv_L_cache=3, **COMMON)
        case _:
            raise SystemExit(f"{kind!r} is none of {', '.join(KINDS)}")
    torch.manual_seed(_SEED)
    hf.AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(directory)


def save_adapter(seed: int, directory: Path) -> None:
    """Write a LoRA adapter of rank 8 of the attention of the kind "llama", as PEFT does."""
    import torch
    from safetensors.torch import save_file

    rank, hidden, widths = 8, 128, {"q_proj": 128, "k_proj": 64, "v_proj": 64, "o_proj": 128}
    numbers = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(4):
        for module, width in widths.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, hidden, generator=numbers) * 0.2
            tensors[f"{name}.lora_B.weight"] = torch.randn(width, rank, generator=numbers) * 0.2
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def with_words(checkpoint: Path, directory: Path) -> Path:
    """A copy of a checkpoint that has a tokenizer and a chat template, for routes that take text: ``words`` are its
    texts. It ends no answer by itself."""
    shutil.copytree(checkpoint, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    (directory / "generation_config.json").unlink(missing_ok=True)
    vocabulary = {word: token for token, word in enumerate(words(range(VOCABULARY)).split())}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": words([0])}
    tokenizer = {"version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    unused = ("truncation", "padding", "normalizer", "post_processor", "decoder")
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer | dict.fromkeys(unused) | {"added_tokens": []}))
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, "unk_token": words([0])}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def words(tokens: Iterable[int]) -> str:
    """The text that a tokenizer of `with_words` makes these tokens of."""
    return " ".join(f"w{token}" for token in tokens)


if __name__ == "__main__":
    for name in sys.argv[2:] or KINDS:
        if name.startswith("adapter-"):
            save_adapter(int(name.removeprefix("adapter-")), Path(sys.argv[1]) / name)
        else:
            save(name, Path(sys.argv[1]) / name)
