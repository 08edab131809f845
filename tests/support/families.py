"""A small random model of each causal and sequence-to-sequence family of transformers, and checks of the product on it."""

import re
import warnings
from typing import Any

import torch
from torch import nn

VOCABULARY = 320
LAYERS = 8

SIZES = (
    (r"(.*_)?vocab_size(_per_layer_input)?|.*_vocab_size|unpadded_vocab_size", VOCABULARY),
    (r"num_hidden_layers|n_layers?|num_layers|num_blocks|(num_)?(encoder|decoder)_layers", LAYERS),
    (r"hidden_size|d_model|n_embd|embedding_dim|emb_dim|embedding_size|dim_model_base|word_embed_proj_dim", 32),
    (r"(input|output)_embedding_size|attention_hidden_size|lru_width|mamba_d_ssm", 32),
    (r".*intermediate_size.*|.*ffn_dim|d_ff|dff|d_inner|.*ffn_hidden_size|dim_ff|feed_forward_size", 48),
    (r"(num_)?((encoder|decoder|swa)_)?attention_heads|num_(encoder|decoder)_attention_heads|n_heads?|num_heads", 4),
    (r"swa_num_attention_heads|num_attention_heads|linear_num_heads|linear_num_value_heads|index_n_heads", 4),
    (r"(swa_)?num_key_value_heads|num_kv_heads|linear_num_key_heads|num_query_groups", 2),
    (r"(swa_)?head_dim|d_head|d_kv|dim_head|qk_(rope|nope)_head_dim|v_head_dim|index_head_dim|kv_channels", 8),
    (r"linear_(key|value)_head_dim|linear_head_dim|attention_head_size|query_pre_attn_scalar|rotary_dim", 8),
    (r"qk_head_dim|attention_head_dim", 16),
    (r".*_rank|d_rel|.*per_layer_input|router_hidden_size", 8),
    (r"(moe_)?num(_local)?_experts|n_routed_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|n_group|num_expert_group", 2),
    (r"topk_group|n_groups|mamba_n_groups", 1),
    (r"mamba_n_heads|mamba_num_heads|mamba_d_head|mamba_head_dim|mamba_headdim|n_mamba_heads", 8),
    (r"mamba_d_state|state_size|ssm_state_size|chunk_size|mamba_chunk_size|block_size", 8),
    (r".*sliding_window(_size)?|window_size|attention_window_size|local_attention|attention_chunk_size", 8),
    (r"index_topk|keep_window_size", 8),
    (r"n_positions|n_ctx|max_seq_len|max_position_embeddings|.*max_position_embeddings", 128),
    (r"max_(source|target)_positions|context_length|model_max_length", 128),
    (r"time_step_rank|mamba_dt_rank|embed_dim|hidden_channels|rel_extent", 8),
)  # fmt: skip
"""Sizes by the names of fields, first match."""

KEPT = re.compile(r".*token_id|.*_idx|.*kernel.*|.*seed|.*buckets|.*theta|.*factor|.*token_index")

FAMILIES: dict[str, dict[str, Any]] = {}
"""Further fields of some families."""


def small_size(name: str, value: Any) -> Any:
    """A small value in place of a config's default one; ``None`` to keep the default."""
    if type(value) is not int or KEPT.fullmatch(name):
        return None
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return size
    return 32 if value > 64 else None


def small_fields(kind: type, family: str | None = None) -> dict[str, Any]:
    """Keyword arguments that make the config of a family small."""
    try:
        default = kind()
    except Exception:
        default = None
    fields: dict[str, Any] = {}
    parts = getattr(kind, "sub_configs", {})
    if default is not None:
        for name, value in default.to_dict().items():
            size = small_size(name, value)
            if name.endswith("_token_id"):
                size = 1 if type(value) is int and value >= VOCABULARY else None
            if size is not None:
                fields[name] = size
    for name, part in parts.items():
        theirs = getattr(default, name, None)
        if theirs is not None and hasattr(theirs, "to_dict"):
            fields[name] = {"model_type": theirs.model_type, **small_fields(type(theirs))}
    return fields | FAMILIES.get(family or "", {})
