"""Run by several processes: three steps of a loop by hand under torch's DDP, and the weights after them, to a file.

``python -m torch.distributed.run --nproc_per_node 2 distiller_job.py OUT``
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from support.distributed_job import Rows, network
from tutelage.data import Batch
from tutelage.engine import leave
from tutelage.integrations import Distiller
from tutelage.methods import LogitMethod

STEPS, ROWS, FIRST = 3, 20, 13
"""Rows of a step, and how many of them the first process has: more than the other."""


def main(out: Path) -> None:
    rows = Rows()
    whole = [rows.fetch(torch.arange(ROWS * step, ROWS * (step + 1))) for step in range(STEPS)]
    parts: list[list[Batch]] = [[b.rows(0, FIRST), b.rows(FIRST, ROWS)] for b in whole]
    method = LogitMethod(temperature=2, alpha=0.7)
    distiller = Distiller(network(16, seed=1), network(24, seed=2), method, example=whole[0])
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    distiller.begin(STEPS)
    through = DistributedDataParallel(distiller) if dist.is_initialized() else distiller
    for step in parts:
        mine = [distiller.batch(part) for part in (step if through is distiller else [step[dist.get_rank()]])]
        scale = distiller.scales(mine)
        for batch in mine:
            distiller.loss(batch, scale, through).backward()
        optimizer.step()
        optimizer.zero_grad()
        distiller.after_step()
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_file(distiller.student.state_dict(), out)


if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
    leave()
