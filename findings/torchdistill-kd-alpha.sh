#!/usr/bin/env bash
# torchdistill 1.1.5: KDLoss cannot be built without alpha, although alpha=None is its default. The constructor computes
# 1 - alpha before it looks whether there is one.
#
# Output seen:
#     TypeError
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"
expected='TypeError'
check torchdistill==1.1.5 torch==2.14.1 torchvision==0.29.1 <<'PROGRAM'
from torchdistill.losses.mid_level import KDLoss

try:
    KDLoss("logits", "output", "logits", "output", temperature=4.0)
    print("built")
except TypeError as error:
    print(type(error).__name__)
PROGRAM
