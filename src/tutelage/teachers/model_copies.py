"""Copies of a teacher's model: with int8 linear layers on a CPU, or with blocks that are sharded over processes.

torch's own ``torch.ao.quantization.quantize_dynamic`` does the same and is about to be removed from torch.
Of a sharded model, the weights are gathered one block at a time.
"""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tutelage.errors import CapabilityError, ModelError
from tutelage.taps import output_head


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, one scale per output, and inputs that are quantised dynamically.

    Both are symmetric: the largest magnitude of a row becomes 127. Sums are int32, outputs float32.
    """

    quantised: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        quantised, scale = _quantise_rows(linear.weight.detach().float())
        self.register_buffer("quantised", quantised.t().contiguous())
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    @property
    def weight(self) -> Tensor:
        """The dequantised weights in float32; torch's transformer layers read them."""
        return self.quantised.t().float() * self.scale.unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        quantised, scale = _quantise_rows(x.reshape(-1, self.in_features).float())
        out = torch._int_mm(quantised, self.quantised).float().mul_(scale).mul_(self.scale)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)


def _quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as integers from -127 to 127, and the scale ``[N, 1]`` of each."""
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round_().to(torch.int8), scale


def quantise_linear_layers(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with linear layers as :class:`Int8Linear`; raises :class:`CapabilityError` without any.

    The output projection of ``nn.MultiheadAttention`` stays, since that module uses its weights directly.
    """
    result = copy.deepcopy(model)
    if isinstance(result, nn.Linear):
        return Int8Linear(result)
    paths = [
        path
        for path, module in result.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    ]
    if not paths:
        raise CapabilityError(
            f"dtype is int8, and {type(model).__name__} has no linear layer to quantise",
            remedy="set dtype: bf16, or remove dtype",
        )
    layers: dict[int, Int8Linear] = {}
    for path in paths:
        layer = result.get_submodule(path)
        if isinstance(layer, nn.Linear):
            result.set_submodule(path, layers.setdefault(id(layer), Int8Linear(layer)))
    return result.eval()


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
