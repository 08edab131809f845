#!/usr/bin/env bash
# ModelOpt 0.47.0: loss modules that have weights are numbered in the order of a set, by address. Models built from one program have
# them in different orders, so the keys of a state dict name another loss after a restart.
#
# Output seen:
#     orders in 20 processes: more than one
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"
expected='orders in 20 processes: more than one'
check nvidia-modelopt==0.47.0 torch==2.14.1 requests==2.34.2 <<'PROGRAM'
import subprocess
import sys

BUILD = """
import random
import modelopt.torch.distill as mtd
from torch import nn

hold = [object() for _ in range(random.randrange(10_000))]  # as other code does


class Loss(nn.modules.loss._Loss):
    def __init__(self, width):
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, student, teacher):
        return (self.map(student) - teacher).square().mean()


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(5, 6))


losses = {(str(i), str(i)): Loss(w) for i, w in enumerate((4, 5, 6))}
config = {"teacher_model": net(), "criterion": losses, "loss_balancer": mtd.StaticLossBalancer([0.3] * 3)}
model = mtd.convert(net(), mode=[("kd_loss", config)])
print(*(m.map.in_features for m in model.loss_modules))
"""
orders = set()
for _ in range(20):
    done = subprocess.run([sys.executable, "-c", BUILD], capture_output=True, text=True, check=True)
    orders.add(done.stdout.splitlines()[-1])
    if len(orders) > 1:
        break
print("orders in 20 processes:", "more than one" if len(orders) > 1 else "one")
PROGRAM
