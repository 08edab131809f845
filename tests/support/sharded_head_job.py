"""Run by two processes: a head that is sharded, by itself and by FSDP2, against all in one place."""

from __future__ import annotations

import copy
import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tutelage.engine import leave
from tutelage.losses import LinearHead, LoRA, cross_entropy, kd, linear_divergence

TOKENS, WIDTH, SIZE = 6, 4, 11  # a vocabulary that two do not share evenly
LABELS = torch.tensor([3, -100, 0, 10, 7, -100])
close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def data(rank: int) -> tuple[Tensor, Tensor]:
    """Other tokens on each process."""
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return hidden, torch.randn(TOKENS, SIZE, generator=generator, dtype=torch.float64)


class Tied(nn.Module):
    """A student whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(SIZE, WIDTH, dtype=torch.float64)
        self.body = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.table(ids)).tanh()


def main() -> None:
    """Compare, on every process."""
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    torch.manual_seed(3)
    shapes = ((SIZE, WIDTH), (SIZE,), (3, WIDTH), (SIZE, 3))
    whole_head = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    expected = []
    for one in range(2):
        hidden, said = data(one)
        leaves = [x.clone().requires_grad_() for x in (hidden, *whole_head)]
        states, weight, bias, a, b = leaves
        scores = 2.0 * torch.tanh((states @ (weight + 0.7 * b @ a).mT + bias) / 2.0)
        (kd(scores, said, temperature=2.0) + 0.5 * cross_entropy(scores, LABELS)).backward()
        expected.append([x.grad for x in leaves])

    hidden, said = data(rank)
    hidden.requires_grad_()
    shards = [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in whole_head]
    head = LinearHead(*shards[:2], softcap=2.0, lora=LoRA(*shards[2:], 0.7))
    linear_divergence(hidden, head, said, temperature=2.0, chunk=4, labels=LABELS, ce_weight=0.5).backward()
    close(hidden.grad, expected[rank][0])
    for k, shard in enumerate(shards):
        assert isinstance(shard.grad, DTensor)
        assert shard.grad.placements == (Shard(0),)
        close(shard.grad.full_tensor(), (expected[0][k + 1] + expected[1][k + 1]) / 2)

    for reshard in (True, False):  # the head a shard after the forward pass, and whole
        torch.manual_seed(4)
        whole = Tied()
        model = fully_shard(copy.deepcopy(whole), mesh=mesh, reshard_after_forward=reshard)
        ids = torch.arange(TOKENS) + rank
        states = model(ids)
        assert isinstance(model.table.weight, DTensor) == reshard
        linear_divergence(states, model.table.weight, said, chunk=4).backward()
        for one in range(2):
            states = whole(torch.arange(TOKENS) + one)
            (kd(states @ whole.table.weight.mT, data(one)[1], temperature=1.0) / 2).backward()
        for name, parameter in model.named_parameters():
            close(parameter.grad.full_tensor(), whole.get_parameter(name).grad)
    print("agrees", flush=True)
    leave()


if __name__ == "__main__":
    main()
