#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.24.0: in families whose experts became one tensor, a target that names a linear layer
# by its full path, such as that of the shared expert, puts the adapters on the tensor of all experts instead.
#
# Output seen:
#     targets: gate_proj, up_proj of the shared expert
#     adapters on: ['model.layers.0.mlp.experts']
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"
expected="targets: gate_proj, up_proj of the shared expert
adapters on: ['model.layers.0.mlp.experts']"
check peft==0.21.2 transformers==5.24.0 torch==2.14.1 <<'PROGRAM'
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

config = Qwen3NextConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, shared_expert_intermediate_size=8,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
)
model = Qwen3NextForCausalLM(config)
targets = [f"model.layers.0.mlp.shared_expert.{name}" for name in ("gate_proj", "up_proj")]
assert all(type(model.get_submodule(path)).__name__ == "Linear" for path in targets)
print("targets: gate_proj, up_proj of the shared expert")
inject_adapter_in_model(LoraConfig(target_modules=targets), model)
print("adapters on:", [path for path, m in model.named_modules() if isinstance(m, LoraLayer)])
PROGRAM
