"""A teacher of which each process keeps a part: its blocks, whose weights are gathered one block at a time."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from tutelage.errors import CapabilityError, ModelError
from tutelage.taps import output_head


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that follow one another: of its lists those that it says are not to be split, else the
    longest list; without its output head and what shares a weight with something else.

    Raises:
        CapabilityError: it has none.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    lists = [list(m) for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    found = [m for each in lists for m in each if type(m).__name__ in names] or max(lists, key=len, default=[])
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    try:
        head: nn.Module | None = output_head(model)
    except ModelError:
        head = None
    found = [
        block
        for block in found
        if any(True for _ in block.parameters())
        and all(places[id(p)] == 1 for p in block.parameters())
        and all(m is not head for m in block.modules())
    ]
    if not found:
        raise CapabilityError(
            f"{type(model).__name__} has no list of layers that could be kept in parts",
            where="teacher.inference.sharded",
            remedy="leave it out, or put the teacher behind a server (teacher.endpoint)",
        )
    return found


def shard_model(model: nn.Module, device: torch.device) -> nn.Module:
    """What runs in the place of ``model``: the same weights, of each block this process's part alone on ``device``.

    Embeddings, norms and the output head are whole on every process. All processes must run it together. ``model``
    stays as it is, where it is.
    """
    own = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    memo: dict[int, Any] = dict(own)  # the same numbers, until they are moved
    runs = copy.deepcopy(model, memo)
    blocks = find_blocks(runs)
    inside = {p for block in blocks for p in block.parameters()}
    for block in blocks:
        fully_shard(block, reshard_after_forward=True)
    rest = {p for p in runs.parameters() if p not in inside and not hasattr(p, "placements")}
    fully_shard(runs, reshard_after_forward=True, ignored_params=rest)
    for parameter in rest:
        parameter.data = parameter.data.to(device)
    for module in runs.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(device)
    return runs
