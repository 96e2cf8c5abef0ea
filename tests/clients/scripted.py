"""A checkpoint whose answers are known: `python tests/clients/scripted.py DIRECTORY` makes it, in the engine's
environment.

Its layers add nothing, so the last token alone decides the next: ``lm_head`` maps each word to its successor. The chat
template ends a prompt with the word that an answer goes on from: one for a text and, where the request offers tools,
another for a call of `FUNCTION`. So a test of an engine's answers needs no model that is capable of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FUNCTION = "get_weather"
_UNKNOWN, _END = "<unk>", "</s>"
_TEXT = ("<text>", "It", "is", "sunny", "in", "Rome.", _END)
_CALL = (
    *(
        "<call>",
        "<tool_call>",
        '{"name":',
        f'"{FUNCTION}",',
        '"arguments":',
        '{"location":',
        '"Rome"}}',
        "</tool_call>",
    ),
    _END,
)
_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    f"{{% if tools %}}{_CALL[0]}{{% else %}}{_TEXT[0]}{{% endif %}}"
)
_SURE = 100.0  # a logit that leaves the others no chance at any usual temperature


def save(directory: Path) -> None:
    """Write the checkpoint: some hundred kilobytes, float32, with its tokenizer and chat template."""
    import torch
    import transformers as hf

    tokens = {word: token for token, word in enumerate(dict.fromkeys((_UNKNOWN, *_TEXT, *_CALL)))}
    config = hf.LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=tokens[_END],
        tie_word_embeddings=False,
    )
    model = hf.AutoModelForCausalLM.from_config(config).to(torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokens), config.hidden_size))
        model.lm_head.weight.zero_()
        for said in (_TEXT, _CALL):
            for word, successor in zip(said, said[1:], strict=False):
                model.lm_head.weight[tokens[successor], tokens[word]] = _SURE
    model.save_pretrained(directory)
    end = {"id": tokens[_END], "content": _END, "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    vocabulary = {"type": "WordLevel", "vocab": tokens, "unk_token": _UNKNOWN}
    tokenizer = {"version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": vocabulary}
    unused = ("truncation", "padding", "normalizer", "post_processor", "decoder")
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer | dict.fromkeys(unused) | {"added_tokens": [end]}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": _TEMPLATE}
    settings |= {"unk_token": _UNKNOWN, "eos_token": _END}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    save(Path(sys.argv[1]))
