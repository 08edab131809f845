"""A student with fewer layers computes what its teacher computes without the removed layers, or is refused."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from tutelage.errors import ModelError
from tutelage.students import prune
from tutelage.students.config_probing import random_model
from tutelage.students.layer_selection import find_layer_stack

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}

TEACHERS: dict[str, Any] = {
    "moe_layer_interval": lambda: hf.Ernie4_5_MoeForCausalLM(
        hf.Ernie4_5_MoeConfig(**SIZES, moe_intermediate_size=16, moe_k=2, moe_num_experts=4, moe_layer_interval=2)
    ),
    "moe_layer_start_index": lambda: hf.Ernie4_5_MoeForCausalLM(
        hf.Ernie4_5_MoeConfig(**SIZES, moe_intermediate_size=16, moe_k=2, moe_num_experts=4, moe_layer_start_index=3)
    ),
    "first_k_dense_replace": lambda: hf.Glm4MoeForCausalLM(
        hf.Glm4MoeConfig(**SIZES, **EXPERTS, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=3)
    ),
    "mlp_only_layers": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, mlp_only_layers=[0, 2, 5])
    ),
    "decoder_sparse_step": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, decoder_sparse_step=2)
    ),
    "no_rope_layers": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**SIZES, no_rope_layer_interval=4)),
    "no_rope_layers and moe_layers": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **SIZES, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1, attention_chunk_size=8,
            interleave_moe_layer_step=2,
        )
    ),
    "layer_types": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SIZES, sliding_window=6)),
    "attention_types": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            vocab_size=60, hidden_size=32, num_layers=8, num_heads=4, attention_types=[[["global", "local"], 4]],
            window_size=6, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        )
    ),
}  # fmt: skip


def skipped(teacher: nn.Module, layers: tuple[int, ...], tokens: Tensor) -> Tensor:
    """The teacher's logits with the other layers skipped."""

    def skip(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return states if isinstance(output, Tensor) else (states, *output[1:])

    _, stack = find_layer_stack(teacher)
    handles = [x.register_forward_hook(skip, with_kwargs=True) for i, x in enumerate(stack) if i not in layers]
    with torch.no_grad():
        logits: Tensor = teacher(input_ids=tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("layers", [(0, 2, 4, 6), (1, 3, 4, 7)])
@pytest.mark.parametrize("field", TEACHERS)
def test_a_student_computes_what_its_teacher_computes_without_the_other_layers(
    field: str, layers: tuple[int, ...]
) -> None:
    source = TEACHERS[field]()
    teacher = random_model(type(source), source.config)
    tokens = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    try:
        student = prune(teacher, map=list(layers)).model
    except ModelError as error:
        assert type(teacher).__name__ in str(error)  # noqa: PT017
        assert (field, layers) in REFUSED
        return
    assert (field, layers) not in REFUSED
    with torch.no_grad():
        own = student(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(own, skipped(teacher, layers, tokens), rtol=1e-4, atol=1e-5)
    assert len(find_layer_stack(student)[1]) == 4


REFUSED = {("moe_layer_interval", (1, 3, 4, 7)), ("decoder_sparse_step", (1, 3, 4, 7))}
"""No period of dense layers gives these."""


def test_a_family_whose_layers_depend_on_their_number_is_refused_by_name() -> None:
    sizes = {"vocab_size": 60, "n_positions": 64, "n_embd": 32, "n_layer": 4, "n_head": 4}
    teacher = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(ModelError, match="a GPT2LMHeadModel student with layers 0, 2 "):
        prune(teacher, layers=2)
    assert prune(hf.GPT2LMHeadModel(hf.GPT2Config(**sizes)), layers=2).layers == (0, 2)


def test_a_window_that_a_short_text_does_not_show_is_compared() -> None:
    config = hf.Qwen2Config(
        **{k: v for k, v in SIZES.items() if k != "head_dim"}, sliding_window=4096, use_sliding_window=True
    )
    config.layer_types = ["full_attention"] * 4 + ["sliding_attention"] * 4
    student = prune(hf.Qwen2ForCausalLM(config), map=[3, 4]).model
    windows: list[int | None] = [layer.self_attn.sliding_window for layer in student.model.layers]
    assert windows == [None, 4096]


def test_a_layer_that_reads_the_choice_of_tokens_of_a_removed_layer_is_refused() -> None:
    config = hf.HYV4Config(
        **SIZES, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, q_lora_rank=8, kv_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, index_topk=16, index_head_dim=16, index_n_heads=2,
    )  # fmt: skip
    teacher = random_model(hf.HYV4ForCausalLM, config)  # layers 0, 1 and 5 choose; the others read their choice
    with pytest.raises(
        ModelError, match="a HYV4ForCausalLM student with layers 0, 2 differs from its teacher: layer 2 reads"
    ):
        prune(teacher, map=[0, 2])
    assert prune(teacher, map=[0, 1, 2, 3]).layers == (0, 1, 2, 3)
