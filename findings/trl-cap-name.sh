#!/usr/bin/env bash
# TRL 1.16.0: add_fused_lm_head, with which its trainers score tokens, reads the cap of the scores from the config as
# final_logit_softcapping alone. RecurrentGemma calls it logits_soft_cap: the cap is left out without a message, and the
# log-probabilities are those of another distribution. Those of Gemma 2 are right.
#
# Output seen:
#     Gemma 2, final_logit_softcapping: log-probabilities of the model: True
#     RecurrentGemma, logits_soft_cap: log-probabilities of the model: False
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"
expected='Gemma 2, final_logit_softcapping: log-probabilities of the model: True
RecurrentGemma, logits_soft_cap: log-probabilities of the model: False'
check trl==1.16.0 torch==2.14.1 transformers==5.24.0 <<'PROGRAM'
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from trl.trainer.utils import add_fused_lm_head

size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
gemma = Gemma2Config(**size, num_key_value_heads=2, head_dim=8, final_logit_softcapping=5.0)
recurrent = RecurrentGemmaConfig(**size, lru_width=16, logits_soft_cap=5.0)
for name, family, config in (
    ("Gemma 2, final_logit_softcapping", Gemma2ForCausalLM, gemma),
    ("RecurrentGemma, logits_soft_cap", RecurrentGemmaForCausalLM, recurrent),
):
    torch.manual_seed(0)
    model = family(config).eval()
    model.get_output_embeddings().weight.data.mul_(40)  # scores as large as a trained model's
    ids = torch.randint(3, 32, (2, 8))
    with torch.no_grad():
        own = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        add_fused_lm_head(model)
        fused = model(ids, labels=ids, fused_lm_head=True).log_probs
    print(f"{name}: log-probabilities of the model: {torch.allclose(own, fused, atol=1e-3)}")
PROGRAM
