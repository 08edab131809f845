#!/usr/bin/env bash
# torchdistill 1.1.5: KDLoss takes the softmax over dimension 1. For a language model's logits [B, L, V] these are positions:
# adding a constant to all logits of one position, which changes no distribution over tokens, changes the loss from 0.
#
# Output seen:
#     same distributions over tokens: True
#     loss above 0.01: True
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"
expected='same distributions over tokens: True
loss above 0.01: True'
check torchdistill==1.1.5 torch==2.14.1 torchvision==0.29.1 <<'PROGRAM'
import torch
from torchdistill.losses.mid_level import KDLoss

torch.manual_seed(0)
teacher = torch.randn(2, 3, 5)
student = teacher + torch.tensor([0.0, 3.0, 0.0])[None, :, None]
kd = KDLoss("logits", "output", "logits", "output", temperature=1.0, alpha=0.0)
loss = kd({"logits": {"output": student}}, {"logits": {"output": teacher}})
print("same distributions over tokens:", torch.allclose(student.softmax(-1), teacher.softmax(-1), atol=1e-6))
print("loss above 0.01:", loss.item() > 0.01)
PROGRAM
