#!/usr/bin/env bash
# torchdistill 1.1.5: KDLoss is alpha CE + (1 - alpha) T^2 KL for every alpha but 0. At alpha=0 the factor T^2 is left out:
# at T = 4 the loss falls to a sixteenth between alpha = 1e-6 and alpha = 0.
#
# Output seen:
#     alpha 1e-06 over alpha 0: 16.00
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"
expected='alpha 1e-06 over alpha 0: 16.00'
check torchdistill==1.1.5 torch==2.14.1 torchvision==0.29.1 <<'PROGRAM'
import torch
from torchdistill.losses.mid_level import KDLoss

torch.manual_seed(0)
student, teacher, targets = torch.randn(8, 10), torch.randn(8, 10), torch.arange(8)


def loss(alpha):
    kd = KDLoss("logits", "output", "logits", "output", temperature=4.0, alpha=alpha)
    return kd({"logits": {"output": student}}, {"logits": {"output": teacher}}, targets).item()


print(f"alpha 1e-06 over alpha 0: {loss(1e-6) / loss(0.0):.2f}")
PROGRAM
