"""A teacher whose blocks are sharded over processes; weights are gathered one block at a time."""

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
    """The consecutive layers of a model: modules in lists that ``_no_split_modules`` names, else the longest list.

    The output head and layers that share a weight are left out. Raises :class:`CapabilityError` if none is left.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    lists = [list(m) for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    candidates = [m for each in lists for m in each if type(m).__name__ in names] or max(lists, key=len, default=[])
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    try:
        head: nn.Module | None = output_head(model)
    except ModelError:
        head = None
    blocks = [
        block
        for block in candidates
        if any(True for _ in block.parameters())
        and all(places[id(p)] == 1 for p in block.parameters())
        and all(m is not head for m in block.modules())
    ]
    if not blocks:
        raise CapabilityError(
            f"{type(model).__name__} has no list of layers to shard",
            where="teacher.inference.sharded",
            remedy="remove it, or put the teacher behind a server (teacher.endpoint)",
        )
    return blocks


def shard_model(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of ``model`` of which ``device`` holds only this process's shard of each block.

    Embeddings, norms and the output head are complete on every process. All processes must run it together. ``model``
    does not change.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    runs = copy.deepcopy(model, memo)  # shares storage until the parameters move
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
