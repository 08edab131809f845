#!/usr/bin/env bash
# torchdistill 1.1.5: SPKDLoss divides each row of the matrix of inner products by the sum of its absolute values. The
# paper (Tung and Mori, ICCV 2019) divides by the L2 norm. normalize(x, 1) sets the norm p=1; the dimension is a later
# argument.
#
# Output seen:
#     equals p=1: True
#     equals p=2: False
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"
expected='equals p=1: True
equals p=2: False'
check torchdistill==1.1.5 torch==2.14.1 torchvision==0.29.1 <<'PROGRAM'
import torch
from torch.nn.functional import normalize
from torchdistill.losses.mid_level import SPKDLoss

torch.manual_seed(0)
student, teacher = torch.randn(8, 16), torch.randn(8, 16)
loss = SPKDLoss("f", "f", "batchmean")({"f": {"output": student}}, {"f": {"output": teacher}})
for p in (1, 2):
    gap = normalize(teacher @ teacher.T, p=p, dim=1) - normalize(student @ student.T, p=p, dim=1)
    print(f"equals p={p}:", torch.allclose(loss, gap.square().sum() / 8**2))
PROGRAM
