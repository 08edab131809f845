"""Tells where a smaller number type makes a model slower on this machine, by timing its largest linear layer."""

import copy
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import nn

from tutelage.experiment.spec import ExperimentSpec
from tutelage.export.timing import time_interleaved
from tutelage.students.lora import NF4Linear
from tutelage.teachers import Ensemble
from tutelage.teachers.model_copies import Int8Linear

SLOWER = 1.2
"""Ratio of times above which a line is said."""

OPERATIONS = 2e9
"""Operations of the layer for the rows that are timed."""

CONVERSIONS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "int8": Int8Linear,
    "bf16": lambda layer: copy.deepcopy(layer).to(torch.bfloat16),
    "fp16": lambda layer: copy.deepcopy(layer).to(torch.float16),
}
"""A linear layer in each type of ``teacher.inference.dtype``."""


def slow_types(
    spec: ExperimentSpec, teacher: nn.Module | None, student: nn.Module, device: torch.device
) -> Iterator[str]:
    """A line for each model whose number type makes it slower than float32 on this CPU."""
    members = () if spec.teacher is None or teacher is None else spec.teacher.members
    models = list(teacher.children()) if isinstance(teacher, Ensemble) else [teacher]
    for member, model in zip(members, models, strict=False):
        kind = member.inference.get("dtype")
        layer = None if model is None else _largest(model, nn.Linear)
        if kind in CONVERSIONS and layer is not None and _is_cpu(member.inference.get("device"), device):
            yield from _line(
                f"the {member.name} in {kind}", CONVERSIONS[kind](layer), layer, "teacher.inference.dtype"
            )
    packed = _largest(student, NF4Linear)
    if isinstance(packed, NF4Linear) and packed.packed.device.type == "cpu":
        yield from _line("the student with 4-bit weights", packed, packed.dequantise(), "student.lora.bits")


def _is_cpu(own: str | None, device: torch.device) -> bool:
    return (device if own is None else torch.device(own)).type == "cpu"


def _largest(model: nn.Module, kind: type[nn.Linear]) -> nn.Linear | None:
    layers = [m for m in model.modules() if isinstance(m, kind)]
    return max(layers, key=lambda m: m.in_features * m.out_features, default=None)


@torch.no_grad()
def _line(who: str, converted: nn.Module, plain: nn.Linear, key: str) -> Iterator[str]:
    ratio = time_ratio(converted, plain)
    if ratio > SLOWER:
        yield (
            f"{who} is slower than in float32 on this machine: its largest linear layer takes {ratio:.2g} times the "
            f"time; leave {key} out unless memory is short"
        )


def time_ratio(converted: nn.Module, plain: nn.Linear) -> float:
    """The time of a layer over that of its float form, the median of a few calls in turn."""
    rows = int(min(max(OPERATIONS / (2 * plain.in_features * plain.out_features), 8), 256))
    generator = torch.Generator().manual_seed(0)
    plain = copy.deepcopy(plain).cpu().float()
    x = torch.randn(rows, plain.in_features, generator=generator)
    own = next((p.dtype for p in converted.parameters() if p.is_floating_point()), torch.float32)
    cells = {("converted", "", 0): lambda: converted(x.to(own)), ("plain", "", 0): lambda: plain(x)}
    slow, fast = (statistics.median(seconds) for seconds in time_interleaved(cells, rounds=7).values())
    return slow / fast
