#!/usr/bin/env bash
# TRL 1.16.0: the loss of GKDTrainer has no factor T^2. At T = 8 its gradient is about a 64th of that at T = 1, so that the
# temperature changes the size of the steps.
#
# Output seen:
#     T^2 times JS over loss: 64.00
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"
expected='T^2 times JS over loss: 64.00'
check trl==1.16.0 torch==2.14.1 transformers==5.24.0 <<'PROGRAM'
import torch
from trl.experimental.gkd.gkd_trainer import GKDTrainer

torch.manual_seed(0)
student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
loss = GKDTrainer.generalized_jsd_loss(student, teacher, torch.zeros(2, 3), beta=0.0, temperature=8.0)
p, q = (teacher / 8).log_softmax(-1), (student / 8).log_softmax(-1)
kl = (p.exp() * (p - q)).sum(-1).mean()
print(f"T^2 times JS over loss: {(64 * kl / loss).item():.2f}")
PROGRAM
