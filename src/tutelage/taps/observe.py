"""Running a model once, and what was seen of it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.errors import ModelError
from tutelage.taps.tap import Tap, of_input, of_output, resolve


@dataclass(frozen=True)
class Needs:
    """What is to be known of one forward pass.

    Attributes:
        logits: the scores of every position.
        hidden: taps, such as module paths; :mod:`tutelage.taps.tap` has the grammar.
        head: the input and the weights of the output head. Without ``logits`` the head itself is not
            run, so the ``[..., C]`` scores never exist.
        temperature: at which the logits will be softened; a teacher that keeps only part of a distribution
            has it at some temperatures.
    """

    logits: bool = True
    hidden: tuple[str, ...] = ()
    head: bool = False
    temperature: float | None = None

    def kinds(self) -> frozenset[str]:
        """The needs by the names that a teacher's ``provides`` uses."""
        wanted = (("logits", self.logits), ("hidden", bool(self.hidden)), ("head", self.head))
        return frozenset(name for name, want in wanted if want)


class Adapter(NamedTuple):
    """Low-rank matrices beside a weight: ``scale * b @ a`` is added to it."""

    a: Tensor
    """``[r, D]``."""
    b: Tensor
    """``[C, r]``."""
    scale: float


class Head(NamedTuple):
    """The last linear layer, and what went into it."""

    inputs: Tensor
    """``[..., D]``."""
    weight: Tensor
    """``[C, D]``."""
    bias: Tensor | None
    """``[C]``."""
    scale: float = 1.0
    """By which the layer's output is multiplied."""
    softcap: float | None = None
    """c of c tanh(z / c), which makes logits of that; ``None`` for none."""
    adapter: Adapter | None = None
    """Low-rank matrices beside the weight."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Head:
        """The head with each of its tensors changed."""
        bias = None if self.bias is None else change(self.bias)
        beside = self.adapter and Adapter(change(self.adapter.a), change(self.adapter.b), self.adapter.scale)
        return self._replace(inputs=change(self.inputs), weight=change(self.weight), bias=bias, adapter=beside)

    def merged(self) -> Head:
        """The same without an adapter: it is added to the weight."""
        beside = self.adapter
        if beside is None:
            return self
        return self._replace(weight=self.weight + beside.scale * beside.b @ beside.a, adapter=None)

    def scores(self, rows: slice | Tensor) -> Tensor:
        """Logits ``[n, C]`` of some of the inputs."""
        raw = F.linear(self.inputs[rows], self.weight, self.bias)
        if self.adapter is not None:
            low = F.linear(self.inputs[rows], self.adapter.a)
            raw = raw + self.adapter.scale * F.linear(low, self.adapter.b)
        raw = raw if self.scale == 1.0 else raw * self.scale
        return raw if self.softcap is None else torch.tanh(raw / self.softcap) * self.softcap


@dataclass(frozen=True)
class Observation:
    """What was seen; only what was needed is there. ``hidden`` has copies, by tap."""

    logits: Tensor | None = None
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    head: Head | None = None


class _Record:
    """What the hooks of one observer write to. They hold on to this alone, never to a model or an observer."""

    def __init__(self) -> None:
        self.active = False
        self.clear()

    def clear(self, taps: tuple[Tap, ...] = (), trains: bool = False) -> None:
        self.calls = {tap.text: 0 for tap in taps}
        self.kept: dict[str, list[Tensor | str]] = {tap.text: [] for tap in taps}
        self.into_head: list[Tensor] = []
        self.trains = trains


def _keep(record: _Record, tap: Tap, found: Tensor | str) -> None:
    """Note one call of a tap's module."""
    number, kept = record.calls[tap.text], record.kept[tap.text]
    record.calls[tap.text] = number + 1
    if (tap.call or 0) >= 0:
        if number != (tap.call or 0):
            return
    elif len(kept) == -tap.call:  # type: ignore[operator]
        del kept[0]
    if not isinstance(found, str):
        if record.trains and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and _reentrant():
            found = _REENTRANT
        else:
            found = found.clone()  # whatever the model does to its own afterwards
    kept.append(found)


_REENTRANT = "would get no gradient: it is inside a re-entrant gradient checkpoint, which runs without autograd"


def _reentrant() -> bool:
    """Whether this is called from inside ``torch.utils.checkpoint`` with ``use_reentrant=True``."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_qualname != "CheckpointFunction.forward":  # so named in all copies
        frame = frame.f_back
    return frame is not None


class Observer:
    """Runs a model and returns what is needed of each run, for as long as it is open.

    The hooks are installed once, here; they record only while this observer runs the model, so nothing else that
    runs it (an evaluation in between, the recomputation of a gradient checkpoint) is recorded, and nothing is kept
    after a run. Open it before a compiled model runs for the first time: ``torch.compile`` ignores later hooks.

    What is captured is a copy with a gradient, so in-place operations of the model do not reach it.

    Args:
        model: its modules get hooks, which :meth:`close` takes off again, as does the end of this object.
        needs: what to return.

    Raises:
        ModelError: a tap that cannot be read, an unknown module (names the three nearest), or no head.
    """

    def __init__(self, model: nn.Module, needs: Needs) -> None:
        self.model, self.needs = model, needs
        self._record, self._handles = _Record(), list[Any]()
        found = [resolve(model, text) for text in needs.hidden]
        self._taps = tuple(tap for tap, _ in found)
        self._head = output_head(model) if needs.head else None
        self._finish, self._extra = logit_scaling(model), no_cache_arguments(model)
        for tap, module in found:
            self._handles.append(_hooked(module, tap, self._record))
        if self._head is not None:
            self._handles.append(_hooked_head(self._head, self._record))

    def __call__(self, inputs: Tensor | Mapping[str, Tensor]) -> Observation:
        """Run the model.

        Args:
            inputs: a tensor, passed as the one argument, or a mapping, passed as keyword arguments.

        Raises:
            ModelError: no logits; a tap that gave nothing, no tensor, or several without saying which; a tap inside
                a re-entrant gradient checkpoint of a model that trains.
        """
        record, head = self._record, self._head
        if self.needs.hidden and not self._handles:
            raise ModelError("this observer is closed", remedy="make another one")
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters())
        record.clear(self._taps, trains)
        record.active = True
        if head is not None and not self.needs.logits:
            head.__dict__["forward"] = _unchanged
        try:
            output = self.model(**{**inputs, **self._extra}) if isinstance(inputs, Mapping) else self.model(inputs)
            hidden = {tap.text: _captured(record, tap) for tap in self._taps}
            seen = None
            if head is not None:
                if len(record.into_head) != 1:
                    raise ModelError(
                        f"the output head ran {len(record.into_head)} times in one forward pass, not once"
                    )
                seen = Head(record.into_head[0], head.weight, head.bias, *self._finish, adapter_of(head))
        finally:
            record.active = False
            record.clear()
            if head is not None:
                head.__dict__.pop("forward", None)  # the class's own forward shows again
        return Observation(logits_of(output) if self.needs.logits else None, hidden, seen)

    def close(self) -> None:
        """Take the hooks off the model."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_handles"):
            self.close()


def _unchanged(x: Tensor) -> Tensor:
    return x


def _hooked(module: nn.Module, tap: Tap, record: _Record) -> Any:
    # Plain functions of plain attributes: torch.compile traces them into its graph, one graph with the record
    # active and one without, and no break in either.
    if tap.side == "input":
        names = list(inspect.signature(module.forward).parameters)

        def enters(module: nn.Module, args: Any, kwargs: Any) -> None:
            if record.active:
                _keep(record, tap, of_input(tap, args, kwargs, names))

        return module.register_forward_pre_hook(enters, with_kwargs=True)

    def leaves(module: nn.Module, args: Any, output: Any) -> None:
        if record.active:
            _keep(record, tap, of_output(tap, output))

    return module.register_forward_hook(leaves)


def _hooked_head(head: nn.Linear, record: _Record) -> Any:
    def enters(module: nn.Module, args: Any) -> None:
        if record.active:
            record.into_head.append(args[0])

    return head.register_forward_pre_hook(enters)


def _captured(record: _Record, tap: Tap) -> Tensor:
    """What the hooks kept for ``tap``."""
    calls, kept = record.calls[tap.text], record.kept[tap.text]
    if not calls:
        raise ModelError(
            f"{tap.text!r} gave nothing in this forward pass",
            remedy="it did not run, or the model was compiled and first run without this tap: "
            "tap it from the first call on, or leave train.compile out",
        )
    if tap.call is None and calls > 1:
        rest = tap.text[len(tap.path) :]
        raise ModelError(
            f"{tap.path!r} ran {calls} times in one forward pass",
            where=f"tap {tap.text!r}",
            remedy=f"say which call: {tap.path}@0{rest} is the first, {tap.path}@{calls - 1}{rest} the last",
        )
    if len(kept) < max(1, -(tap.call or 0)):
        raise ModelError(
            f"{tap.path!r} ran {calls} times in one forward pass: there is no call {tap.call}",
            where=f"tap {tap.text!r}",
            remedy=f"calls are {tap.path}@0 to {tap.path}@{calls - 1}",
        )
    found = kept[0]
    if isinstance(found, str):
        remedy = (
            "checkpoint with use_reentrant=False" if found is _REENTRANT else "`tutelage taps` shows what there is"
        )
        raise ModelError(found, where=f"tap {tap.text!r}", remedy=remedy)
    return found


def compile_apart(model: nn.Module, **options: Any) -> None:
    """``torch.compile`` a model in place, with a graph of its own; put its taps on before.

    ``model.compile()`` shares graphs among all models of a class, and leaves their taps out of account: one with taps
    would run the graph of another without.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    run.__code__ = run.__code__.replace()  # graphs are kept by the code object
    model._compiled_call_impl = torch.compile(run, **options)


def output_head(model: nn.Module) -> nn.Linear:
    """The layer that makes logits: as the model names it, else its last linear layer.

    Raises:
        ModelError: there is no such layer.
    """
    for name in ("get_output_embeddings", "get_classifier"):
        getter = getattr(model, name, None)
        found = as_linear(getter() if callable(getter) else None)
        if found is not None:
            return found
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ModelError(
            f"{type(model).__name__} has no linear output layer",
            remedy="a method that needs the head works on models that end in nn.Linear",
        )
    return linear[-1]


def as_linear(module: nn.Module | None) -> nn.Linear | None:
    """``module`` if it is a linear layer, also one with low-rank matrices beside it: it has the same attributes."""
    base = getattr(module, "get_base_layer", None)
    if not isinstance(base() if callable(base) else module, nn.Linear):
        return None
    found: Any = module
    return found


def adapter_of(head: nn.Module) -> Adapter | None:
    """The low-rank matrices beside a linear layer.

    Raises:
        ModelError: several, or of a kind that is not a product of two.
    """
    if not hasattr(head, "get_base_layer"):
        return None
    layer: Any = head
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.disable_adapters or layer.merged or names[0] in layer.lora_variant:
        raise ModelError(
            f"the output head has the adapters {', '.join(names) or 'none'}, and scores are made of one plain LoRA",
            remedy="keep one, active and not merged",
        )
    (name,) = names
    return Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))


def no_cache_arguments(model: nn.Module) -> dict[str, bool]:
    """What keeps a decoder from filling a cache that nobody reads, and for which it would not look at packed rows."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    caches = bool(getattr(getattr(model, "config", None), "use_cache", False))
    return {"use_cache": False} if caches and "use_cache" in inspect.signature(base.forward).parameters else {}


def logit_scaling(model: nn.Module) -> tuple[float, float | None]:
    """What a transformers language model does to the output of its head, by its config: scale, and soft cap.

    Gemma caps, Cohere multiplies, Granite divides.
    """
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    scale = 1.0
    for name, power in (("logit_scale", 1), ("logits_scaling", -1), ("lm_head_multiplier", 1)):
        factor = getattr(config, name, None)
        if isinstance(factor, (int, float)) and not isinstance(factor, bool) and factor:
            scale *= float(factor) ** power
    cap = getattr(config, "final_logit_softcapping", None)
    return scale, float(cap) if isinstance(cap, (int, float)) and cap else None


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


def observe(model: nn.Module, inputs: Tensor | Mapping[str, Tensor], needs: Needs | None) -> Observation:
    """Run ``model`` once and return what is needed of it; not at all where ``needs`` is ``None``.

    Args:
        model: called with ``inputs`` as its one argument, or as keyword arguments.
        inputs: a tensor or a mapping.
        needs: what to return.

    Raises:
        ModelError: as :class:`Observer`.
    """
    if needs is None:
        return Observation()
    with Observer(model, needs) as observer:
        return observer(inputs)


def vocabulary_head(model: nn.Module) -> nn.Linear | None:
    """The layer that scores a vocabulary for each position; ``None`` for a model without one."""
    getter = getattr(model, "get_output_embeddings", None)
    named = as_linear(getter() if callable(getter) else None)
    if named is not None:
        return named
    if callable(getter):  # transformers says that it has none
        return None
    try:
        last = output_head(model)
    except ModelError:
        return None
    embedded = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    return last if embedded and last.out_features == max(e.num_embeddings for e in embedded) else None
