#!/usr/bin/env bash
# Liger Kernel 0.8.5: where the teacher's head has more rows than the student's, LigerFusedLinearJSDLoss gives the student a logit
# of zero in each of them. A row of padding to which the teacher gives no probability then takes probability from the
# student: student and teacher are equal on all tokens, and the loss is not 0.
#
# Output seen:
#     without padding: 0.000
#     with 8 rows of padding, above 0.01: True
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"
expected='without padding: 0.000
with 8 rows of padding, above 0.01: True'
check liger-kernel==0.8.5 torch==2.14.1 <<'PROGRAM'
import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

torch.manual_seed(0)
hidden, labels = torch.rand(6, 4), torch.arange(6)
head = torch.randn(16, 4)
padding = torch.full((8, 4), -30.0)  # hidden states are positive: no probability
loss = LigerFusedLinearJSDLoss(0.0, 1.0, compiled=False)
print(f"without padding: {loss(hidden, head, hidden, head, labels).abs().item():.3f}")
padded = loss(hidden, head, hidden, torch.cat([head, padding]), labels)
print("with 8 rows of padding, above 0.01:", padded.item() > 0.01)
PROGRAM
