#!/usr/bin/env bash
# ModelOpt 0.47.0: LogitsDistillationLoss with its default reduction divides the sum of the KL divergence by tokens and by the
# vocabulary, so that it is V times smaller than the KL divergence for each token.
#
# Output seen:
#     KL over loss: 1000.0
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"
expected='KL over loss: 1000.0'
check nvidia-modelopt==0.47.0 torch==2.14.1 requests==2.34.2 <<'PROGRAM'
import torch
from modelopt.torch.distill import LogitsDistillationLoss

torch.manual_seed(0)
student, teacher = torch.randn(2, 8, 1000), torch.randn(2, 8, 1000)
p, q = teacher.log_softmax(-1), student.log_softmax(-1)
kl = (p.exp() * (p - q)).sum(-1).mean()
print(f"KL over loss: {(kl / LogitsDistillationLoss()(student, teacher)).item():.1f}")
PROGRAM
