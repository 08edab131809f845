"""Small causal models of transformers with random weights, most of them with experts."""

from __future__ import annotations

from typing import Any

import torch

EXPERTS = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
QWEN_NEXT = {
    "head_dim": 8, "num_experts": 4, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip


def family(name: str, **options: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**EXPERTS, **options})
    return getattr(transformers, f"{name}ForCausalLM")(config)


FAMILIES = [
    ("Llama", {"tie_word_embeddings": True}), ("Mixtral", {"num_local_experts": 4}), ("Qwen3Moe", {"num_experts": 4}),
    ("Qwen3Next", QWEN_NEXT), ("GptOss", {"num_local_experts": 4, "head_dim": 8}), ("DeepseekV3", DEEPSEEK),
]  # fmt: skip
