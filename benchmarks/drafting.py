"""Tiny checkpoints of models that draft for others, and of those that they draft for.

Run in the engine's environment: ``python -m agentstate.benchmarks.drafting KIND DIRECTORY``. Weights are random, so
that no model would ever foresee another one's tokens. Here they do so most of the time, because the targets' first
layer decides what they say: the layers above it add little, and a draft is that first layer. What it attends to decides
as well, so that a draft whose KV is missing foresees nothing. There is no tokenizer: requests are sent as token ids.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DRAFT_OF = {"draft": "target", "eagle": "target", "eagle3": "target"}
"""Which model each of the others drafts for; ``mtp``, ``sparse`` and ``linear`` have drafts in their own
checkpoints."""
KINDS = ("target", *DRAFT_OF, "mtp", "sparse", "linear")
VOCABULARY = 1024
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
"""What the configurations of all tiny models have."""
CHOSEN = 64
"""How many tokens a token of ``sparse`` attends to."""
_LAYERS = 4
# By how much the layers above the first one are scaled down.
_QUIET = 0.05
# What makes of a layer's work what it adds.
_ADDED = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj")

Tensors = dict[str, Any]


def save(kind: str, directory: Path, common: Mapping[str, Any] = COMMON) -> None:
    """Write a checkpoint of one of `KINDS`, of a configuration with the ``common`` fields."""
    directory.mkdir(parents=True, exist_ok=True)
    match kind:
        case "target":
            config, tensors = _target(common)
        case "draft":
            config, tensors = _target(common)
            config["num_hidden_layers"] = 1
            tensors = {name: tensor for name, tensor in tensors.items() if _layer(name) in (None, 0)}
        case "eagle":
            config, tensors = _eagle(common)
        case "eagle3":
            config, tensors = _eagle3(common)
        case "mtp":
            config, tensors = _mtp(common)
        case "sparse":
            config, tensors = _sparse(common)
        case "linear":
            config, tensors = _linear(common)
        case _:
            raise SystemExit(f"{kind!r} is none of {', '.join(KINDS)}")
    from safetensors.torch import save_file

    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def _target(common: Mapping[str, Any]) -> tuple[dict[str, Any], Tensors]:
    import transformers as hf

    return _of(hf.LlamaConfig(num_hidden_layers=_LAYERS, head_dim=32, **common))


def _of(hf_config: Any, loud: int = 0, quiet: float = _QUIET) -> tuple[dict[str, Any], Tensors]:
    """A random model, with one layer that decides."""
    import torch
    import transformers as hf

    torch.manual_seed(_LAYERS)
    model = hf.AutoModelForCausalLM.from_config(hf_config).to(torch.float32)
    config = {**hf_config.to_dict(), "architectures": [type(model).__name__], "dtype": "float32"}
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if name.endswith("embed_tokens.weight"):
            # As large as what a layer adds. The padding token's would be zero.
            tensor[0] = torch.randn(tensor.shape[1])
            tensor /= tensor.square().mean(-1, keepdim=True).sqrt()
        elif _layer(name) not in (None, loud) and name.endswith(_ADDED):
            tensor *= quiet
    return config, tensors


def _layer(name: str) -> int | None:
    """The number of the layer that a tensor is of."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else None


def _eagle(common: Mapping[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """A layer on a token's embedding, joined with the target's last state of the token before, which this one drops."""
    import torch

    config, of_target = _target(common)
    size = config["hidden_size"]
    prefix = "model.layers.0."
    tensors = {
        name.removeprefix("model."): tensor
        for name, tensor in of_target.items()
        if name.startswith(prefix) and "input_layernorm" not in name
    }
    tensors["fc.weight"] = torch.cat([torch.eye(size), torch.zeros(size, size)], 1)
    tensors["fc.bias"] = torch.zeros(size)
    tensors["embed_tokens.weight"] = of_target["model.embed_tokens.weight"]
    return config | {"architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1}, tensors


def _eagle3(common: Mapping[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """A layer on what goes on from the target's states, which are dropped here, with a token's embedding beside it.

    Half of the heads are the target's. The others look at their own token and pass its embedding on, which the layer
    would otherwise not add to what goes on.
    """
    import torch

    config, of_target = _target(common)
    size, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head = size // heads
    sharp, strong = 4.0, 30.0
    of_layer = {name.removeprefix("model.layers.0."): tensor for name, tensor in of_target.items() if _layer(name) == 0}
    own = torch.eye(size)

    def each_head(tensor: Any) -> Any:
        return tensor.view(kv_heads, 1, head, size).expand(-1, heads // kv_heads, -1, -1).reshape(size, size)

    def beside_nothing(tensor: Any) -> Any:
        return torch.cat([tensor, torch.zeros_like(tensor)], 1)

    projections = {
        "q_proj": torch.cat([of_layer["self_attn.q_proj.weight"], sharp * own]),
        "k_proj": torch.cat([each_head(of_layer["self_attn.k_proj.weight"]), sharp * own]),
        "v_proj": torch.cat([each_head(of_layer["self_attn.v_proj.weight"]), own]),
    }
    tensors = {f"midlayer.self_attn.{name}.weight": beside_nothing(tensor) for name, tensor in projections.items()}
    output = torch.cat([of_layer["self_attn.o_proj.weight"], own], 1)
    tensors["midlayer.self_attn.o_proj.weight"] = strong * output
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"):
        tensors[f"midlayer.{name}.weight"] = of_layer[f"{name}.weight"]
    tensors["midlayer.mlp.down_proj.weight"] = strong * tensors["midlayer.mlp.down_proj.weight"]
    tensors["midlayer.hidden_norm.weight"] = torch.zeros(size)
    tensors["fc.weight"] = torch.zeros(size, 3 * size)
    tensors["norm.weight"] = of_target["model.norm.weight"]
    tensors["lm_head.weight"] = of_target["lm_head.weight"]
    tensors["embed_tokens.weight"] = of_target["model.embed_tokens.weight"]
    vocabulary = config["vocab_size"]
    tensors["t2d"] = torch.ones(vocabulary, dtype=torch.bool)
    tensors["d2t"] = torch.zeros(vocabulary, dtype=torch.int64)
    return config | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "num_attention_heads": 2 * heads,
        "num_key_value_heads": 2 * heads,
        "draft_vocab_size": vocabulary,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "use_aux_hidden_state": True},
        "norm_output": True,
    }, tensors


def _sparse(common: Mapping[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """DeepSeek-V3.2's shape: `_mtp` with an index, in which the third layer goes by the second one's choice, as some of
    GLM-5's do."""
    config, tensors = _mtp(common, layers=4, index_topk=CHOSEN, index_n_heads=4, index_head_dim=128)
    shared = "model.layers.2.self_attn.indexer."
    assert any(name.startswith(shared) for name in tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(shared)}
    return config | {"index_topk_pattern": "FFSF"}, tensors


def _mtp(common: Mapping[str, Any], layers: int = 3, **index: int) -> tuple[dict[str, Any], Tensors]:
    """DeepSeek-V3's shape: a layer more than the configuration counts drafts."""
    import torch
    import transformers as hf

    yarn = {"factor": 4.0, "original_max_position_embeddings": 2048, "beta_fast": 32, "beta_slow": 1}
    yarn |= {"mscale": 0.707, "mscale_all_dim": 0.707}
    hf_config = (hf.DeepseekV32Config if index else hf.DeepseekV3Config)(
        num_hidden_layers=layers,
        q_lora_rank=64,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        rope_parameters=yarn | {"rope_type": "yarn", "rope_theta": 1e4},
        **{**common, "num_key_value_heads": 4, **index},
    )
    config, tensors = _of(hf_config)
    tensors = _each_expert(tensors)
    size, prefix = config["hidden_size"], f"model.layers.{layers}."
    draft = {
        name.replace("model.layers.0.", prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.layers.0.")
    }
    draft[f"{prefix}enorm.weight"] = draft[f"{prefix}hnorm.weight"] = torch.ones(size)
    draft[f"{prefix}eh_proj.weight"] = torch.cat([torch.eye(size), torch.zeros(size, size)], 1)
    draft[f"{prefix}shared_head.norm.weight"] = tensors["model.norm.weight"]
    draft[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"]
    draft[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    further = {"num_nextn_predict_layers": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
    rope = {"rope_theta": 1e4, "rope_scaling": {**yarn, "type": "yarn", "rope_type": "yarn"}}
    return config | further | rope, tensors | draft


def _linear(common: Mapping[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """Qwen3-Next's shape: layers with recurrent state, some of attention, and one more of attention that drafts."""
    import torch
    import transformers as hf

    interval, layers = 3, 6
    hf_config = hf.Qwen3NextConfig(
        num_hidden_layers=layers,
        head_dim=32,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        layer_types=[*["linear_attention"] * (interval - 1), "full_attention"] * (layers // interval),
        decoder_sparse_step=1,
        **common,
    )
    loud = interval - 1
    # What layers with states add is not to be lost in the noise: their states are to decide some tokens too.
    config, tensors = _of(hf_config, loud, quiet=0.03)
    tensors = _each_expert(tensors)
    size, prefix = config["hidden_size"], f"model.layers.{loud}."
    draft = {
        name.replace(prefix, "mtp.layers.0."): tensor for name, tensor in tensors.items() if name.startswith(prefix)
    }
    draft["mtp.fc.weight"] = torch.cat([torch.eye(size), torch.zeros(size, size)], 1)
    draft["mtp.pre_fc_norm_embedding.weight"] = draft["mtp.pre_fc_norm_hidden.weight"] = torch.zeros(size)
    draft["mtp.norm.weight"] = tensors["model.norm.weight"]
    return config | {"full_attention_interval": interval, "num_nextn_predict_layers": 1}, tensors | draft


def _each_expert(tensors: Tensors) -> Tensors:
    """Transformers keeps a layer's experts in one tensor, checkpoints each expert by itself."""
    split: Tensors = {}
    for name, tensor in tensors.items():
        before, is_of_experts, part = name.rpartition(".experts.")
        if not is_of_experts or part not in ("gate_up_proj", "down_proj"):
            split[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            if part == "down_proj":
                split[f"{before}.experts.{number}.down_proj.weight"] = expert
            else:
                gate, up = expert.chunk(2)
                split[f"{before}.experts.{number}.gate_proj.weight"] = gate
                split[f"{before}.experts.{number}.up_proj.weight"] = up
    return split


if __name__ == "__main__":
    save(sys.argv[1], Path(sys.argv[2]))
