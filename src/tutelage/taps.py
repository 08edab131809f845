"""Looking into a model while it runs: activations by module path, and its output head.

Teacher and student are read by the same function, :func:`observe`, whatever kind of model they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from tutelage.errors import ModelError, nearest


@dataclass(frozen=True)
class Needs:
    """What is to be known of one forward pass.

    Attributes:
        logits: the scores of every position.
        hidden: module paths whose outputs are wanted.
        head: the input and the weights of the output head. Without ``logits`` the head itself is not
            run, so the ``[..., C]`` scores never exist.
    """

    logits: bool = True
    hidden: tuple[str, ...] = ()
    head: bool = False

    def kinds(self) -> frozenset[str]:
        """The needs by the names that a teacher's ``provides`` uses."""
        wanted = (("logits", self.logits), ("hidden", bool(self.hidden)), ("head", self.head))
        return frozenset(name for name, want in wanted if want)


class Head(NamedTuple):
    """The last linear layer, and what went into it."""

    inputs: Tensor
    """``[..., D]``."""
    weight: Tensor
    """``[C, D]``."""
    bias: Tensor | None
    """``[C]``."""


@dataclass(frozen=True)
class Observation:
    """What :func:`observe` saw; only what was needed is there."""

    logits: Tensor | None = None
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    head: Head | None = None


def find(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path``.

    Raises:
        ModelError: there is none; names the three nearest.
    """
    modules = dict(model.named_modules())
    if path not in modules:
        raise ModelError(
            f"{type(model).__name__} has no module {path!r}",
            remedy=f"nearest: {', '.join(nearest(path, [m for m in modules if m])) or ', '.join(list(modules)[1:4])}",
        )
    return modules[path]


@contextmanager
def capture(model: nn.Module, paths: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """The outputs of the modules at ``paths`` during the block; the hooks go with it.

    Raises:
        ModelError: unknown path, an output that is no tensor or that a later module changes in place, a module
            that ran twice, or one that did not run.
    """
    captured: dict[str, Tensor] = {}
    versions: dict[str, int] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, (tuple, list)) and output else output
            if not isinstance(tensor, Tensor):
                raise ModelError(
                    f"{path!r} gives a {type(output).__name__}, not a tensor", remedy="tap a module inside"
                )
            if path in captured:
                raise ModelError(f"{path!r} ran twice in one forward pass", remedy="tap a module that runs once")
            captured[path], versions[path] = tensor, 0 if tensor.is_inference() else tensor._version

        return hook

    handles = [find(model, path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
    silent = [path for path in paths if path not in captured]
    if silent:
        raise ModelError(
            f"{silent[0]!r} gave nothing in this forward pass",
            remedy="it did not run, or the model was compiled and first run without this tap: "
            "tap it from the first call on, or leave train.compile out",
        )
    for path, tensor in captured.items():
        if not tensor.is_inference() and tensor._version != versions[path]:
            raise ModelError(
                f"the output of {path!r} was changed in place after it was captured, as by an in-place ReLU",
                remedy="tap the module that changes it, or build the model with inplace=False",
            )


def output_head(model: nn.Module) -> nn.Linear:
    """The layer that makes logits: as the model names it, else its last linear layer.

    Raises:
        ModelError: there is no such layer.
    """
    for name in ("get_output_embeddings", "get_classifier"):
        getter = getattr(model, name, None)
        found = getter() if callable(getter) else None
        if isinstance(found, nn.Linear):
            return found
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ModelError(
            f"{type(model).__name__} has no linear output layer",
            remedy="a method that needs the head works on models that end in nn.Linear",
        )
    return linear[-1]


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, ``.logits``, or the first of a tuple.

    Raises:
        ModelError: there is no tensor there.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise ModelError(
            f"the model returned a {type(output).__name__} without logits",
            remedy="return a tensor, a tuple that starts with it, or an object with .logits",
        )
    return found


def observe(model: nn.Module, inputs: Tensor | Mapping[str, Tensor], needs: Needs) -> Observation:
    """Run ``model`` once and return what is needed of it.

    Args:
        model: called with ``inputs`` as its one argument, or as keyword arguments.
        inputs: a tensor or a mapping.
        needs: what to return.

    Raises:
        ModelError: an unknown tap, no logits, or no head.
    """
    head = output_head(model) if needs.head else None
    into_head: list[Tensor] = []

    def run() -> Any:
        return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)

    with capture(model, needs.hidden) as hidden:
        if head is None:
            output = run()
        else:
            handle = head.register_forward_pre_hook(lambda module, args: into_head.append(args[0]))
            if not needs.logits:
                head.__dict__["forward"] = lambda x: x
            try:
                output = run()
            finally:
                handle.remove()
                head.__dict__.pop("forward", None)  # the class's own forward shows again
    seen = None
    if head is not None:
        if len(into_head) != 1:
            raise ModelError(f"the output head ran {len(into_head)} times in one forward pass, not once")
        seen = Head(into_head[0], head.weight, head.bias)
    return Observation(logits_of(output) if needs.logits else None, dict(hidden), seen)
