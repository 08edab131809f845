"""Observing a forward pass: logits, taps and the output head."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn

from tutelage.errors import ModelError
from tutelage.taps.calls import call_model, reader_of
from tutelage.taps.heads import Head, adapter_of, count_tokens, logit_scaling, no_cache_arguments, output_head
from tutelage.taps.tap import Tap, of_input, of_output, resolve


@dataclass(frozen=True)
class Needs:
    """What to observe of one forward pass.

    Attributes:
        logits: the model's logits.
        hidden: taps, such as module paths; :mod:`tutelage.taps.tap` has the grammar.
        head: the input and the weights of the output head. Without ``logits`` the head itself is not run, so the
            ``[..., C]`` logits never exist.
        temperature: T of the soft labels; a teacher with top-k or sampled outputs has them at some temperatures only.
    """

    logits: bool = True
    hidden: tuple[str, ...] = ()
    head: bool = False
    temperature: float | None = None

    def kinds(self) -> frozenset[str]:
        """The needs, by the names in a teacher's ``provides``."""
        needs = (("logits", self.logits), ("hidden", bool(self.hidden)), ("head", self.head))
        return frozenset(name for name, needed in needs if needed)


@dataclass(frozen=True)
class Observation:
    """What :class:`Needs` asked for. ``hidden`` has copies, by tap."""

    logits: Tensor | None = None
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    head: Head | None = None


class _Record:
    """The values that the hooks of one observer capture. Hooks refer to this only, never to a model or observer."""

    def __init__(self) -> None:
        self.active = False
        self.clear()

    def clear(self, taps: tuple[Tap, ...] = (), trains: bool = False) -> None:
        self.calls = {tap.text: 0 for tap in taps}
        self.values: dict[str, list[Tensor | str]] = {tap.text: [] for tap in taps}
        self.head_inputs: list[Tensor] = []
        self.trains = trains

    def add(self, tap: Tap, value: Tensor | str) -> None:
        """Record one call of a tap's module: its tensor, or an error."""
        number, values = self.calls[tap.text], self.values[tap.text]
        self.calls[tap.text] = number + 1
        if (tap.call or 0) >= 0:
            if number != (tap.call or 0):
                return
        elif len(values) == -tap.call:  # type: ignore[operator]
            del values[0]
        if not isinstance(value, str):
            if self.trains and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and _is_reentrant():
                value = _REENTRANT
            else:
                value = value.clone()  # the model may change its own in place
        values.append(value)


_REENTRANT = "would get no gradient: it is inside a re-entrant gradient checkpoint, which runs without autograd"


def _is_reentrant() -> bool:
    """Whether the caller runs inside ``torch.utils.checkpoint`` with ``use_reentrant=True``."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_qualname != "CheckpointFunction.forward":  # the name in all copies
        frame = frame.f_back
    return frame is not None


class Observer:
    """Runs a model and returns what ``needs`` lists.

    The hooks are installed once, here. They record only while this observer runs the model, not in an evaluation in
    between or in the recomputation of a gradient checkpoint, and nothing is kept after a run. Open it before the
    first run of a compiled model: ``torch.compile`` ignores later hooks. Captured tensors are copies with a gradient,
    which in-place operations of the model do not change.

    Args:
        model: its modules get hooks, which :meth:`close` or the deletion of this object removes.
        needs: what to return.

    Raises:
        ModelError: a tap with a syntax error, an unknown module (names the three nearest), or no head.
    """

    def __init__(self, model: nn.Module, needs: Needs) -> None:
        self.model, self.needs = model, needs
        self._record, self._handles = _Record(), list[Any]()
        modules = [resolve(model, text) for text in needs.hidden]
        self._taps = tuple(tap for tap, _ in modules)
        self._head = output_head(model) if needs.head else None
        self._scaling, self._arguments = logit_scaling(model), no_cache_arguments(model)
        self._vocabulary = count_tokens(model)
        for tap, module in modules:
            self._handles.append(_add_hook(module, tap, self._record))
        if self._head is not None:
            self._handles.append(_add_head_hook(self._head, self._record))

    def __call__(self, inputs: Tensor | Mapping[str, Tensor]) -> Observation:
        """Run the model.

        Args:
            inputs: see :func:`tutelage.taps.call_model`.

        Raises:
            ModelError: no logits; a tap without a value, without a tensor, or of a module with several calls without
                a call number; a tap inside a re-entrant gradient checkpoint of a model in training.
        """
        record, head = self._record, self._head
        if self.needs.hidden and not self._handles:
            raise ModelError("this observer is closed", remedy="create a new one")
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters())
        dense = head is not None and not self._head_is_exact(inputs)
        record.clear(self._taps, trains)
        record.active = True
        if head is not None and not self.needs.logits and not dense:
            head.__dict__["forward"] = _identity
        try:
            output = call_model(self.model, inputs, self._arguments)
            hidden = {tap.text: _captured_tensor(record, tap) for tap in self._taps}
            observed_head = None
            if dense:
                logits = reader_of(self.model).read(output)[..., : self._vocabulary]
                observed_head = Head(logits, logits.new_empty(logits.shape[-1], 0), None)
            elif head is not None:
                if (calls := len(record.head_inputs)) != 1:
                    raise ModelError(f"the output head ran {calls} times in one forward pass, not once")
                (x,) = record.head_inputs
                observed_head = Head(x, head.weight, head.bias, *self._scaling, adapter_of(head), self._vocabulary)
        finally:
            record.active = False
            record.clear()
            if head is not None:
                head.__dict__.pop("forward", None)  # restores the class's own forward
        scores = reader_of(self.model).read(output) if self.needs.logits else None
        if scores is not None and self._vocabulary is not None:
            scores = scores[..., : self._vocabulary]
        return Observation(scores, hidden, observed_head)

    def _head_is_exact(self, inputs: Tensor | Mapping[str, Tensor]) -> bool:
        """Whether the head, its scale and its cap give the model's own logits; tested once, on one row taken twice.

        In the second row the head's output is enlarged to 50, where a cap of any usual size changes it. A trained
        weight behind the head counts as a difference, also while it is zero.
        """
        known = self.model.__dict__.get(EXACT)
        if known is not None:
            return bool(known)
        head, record, factors = self._head, self._record, list[Tensor]()
        assert head is not None
        scale, cap = self._scaling
        forward = head.forward

        def enlarged(x: Tensor) -> Tensor:
            out: Tensor = forward(x).detach()
            factors.append(torch.ones_like(out[:, :1]))
            factors[0][1:] = 50.0 / max(float(out.abs().max()) * abs(scale), 1e-6)
            torch.set_grad_enabled(True)  # until the end of no_grad: shows the weights behind the head
            return out * factors[0]

        few: Any = _same_row_twice(inputs)
        record.clear(self._taps)
        record.active = True
        head.__dict__["forward"] = enlarged
        try:
            with torch.no_grad(), evaluating(self.model):  # _call_impl: not the compiled graph of other sizes
                output = call_model(self.model, few, self._arguments, self.model._call_impl)
                if len(record.head_inputs) != 1:
                    return True  # which is refused where the head is used
            with torch.no_grad():
                scores = _gather(Head(record.head_inputs[0], head.weight, head.bias, 1.0, None, adapter_of(head)))
                computed = (scores * factors[0]).float() * scale
                computed = computed if cap is None else torch.tanh(computed / cap) * cap
        finally:
            record.active = False
            record.clear()
            head.__dict__.pop("forward", None)
        logits = reader_of(self.model).read(output)
        rounds = min(torch.finfo(x.dtype).bits for x in (logits, scores)) < 32
        tolerance = (2e-2 if rounds else 1e-4) * computed.nan_to_num().abs().amax((*range(1, computed.ndim),), True)
        exact = computed.shape == logits.shape and not logits.requires_grad
        exact = exact and bool(((computed - logits.float()).abs() <= tolerance).all()) and self._runs_headless(few)
        self.model.__dict__[EXACT] = exact
        return exact

    def _runs_headless(self, inputs: Tensor | Mapping[str, Tensor]) -> bool:
        """Whether the model runs without its head, whose output BART adds a number for each token to."""
        assert self._head is not None
        self._head.__dict__["forward"] = _identity
        try:
            with torch.no_grad(), evaluating(self.model):
                call_model(self.model, inputs, self._arguments, self.model._call_impl)
        except (RuntimeError, ValueError, IndexError):  # of the sizes
            return False
        finally:
            self._head.__dict__.pop("forward", None)
        return True

    def close(self) -> None:
        """Remove the hooks from the model."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_handles"):
            self.close()


EXACT = "_head_is_exact"
"""Where a model keeps whether its logits are those of its head."""


def _same_row_twice(inputs: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
    """The first row of some inputs, two times; of token ids at most 16, all of which count."""
    if isinstance(inputs, Tensor):
        return torch.cat([inputs[:1], inputs[:1]])
    ids = inputs.get("input_ids")
    named = dict(inputs)
    if ids is not None and ids.ndim == 2:
        named = {name: x[:, :16] for name, x in inputs.items() if x.shape == ids.shape and name != "position_ids"}
    twice = {name: torch.cat([x[:1], x[:1]]) for name, x in named.items()}
    rows = {name: torch.ones_like(x) if name == "attention_mask" else x for name, x in twice.items()}
    same_kind: Any = type(inputs)  # keyword or positional arguments
    return rows if type(inputs) is dict else same_kind(rows)


def _gather(head: Head) -> Tensor:
    """The scores of a head whose weights may be sharded over processes."""
    return head.map(lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x).scores(slice(None))


def _identity(x: Tensor) -> Tensor:
    return x


def _add_hook(module: nn.Module, tap: Tap, record: _Record) -> Any:
    # Plain functions of plain attributes: torch.compile traces them into its graph, one graph with the record
    # active and one without, with no graph break in either.
    if tap.side == "input":
        names = list(inspect.signature(module.forward).parameters)

        def capture_input(module: nn.Module, args: Any, kwargs: Any) -> None:
            if record.active:
                record.add(tap, of_input(tap, args, kwargs, names))

        return module.register_forward_pre_hook(capture_input, with_kwargs=True)

    def capture_output(module: nn.Module, args: Any, output: Any) -> None:
        if record.active:
            record.add(tap, of_output(tap, output))

    return module.register_forward_hook(capture_output)


def _add_head_hook(head: nn.Linear, record: _Record) -> Any:
    def capture_input(module: nn.Module, args: Any) -> None:
        if record.active:
            record.head_inputs.append(args[0])

    return head.register_forward_pre_hook(capture_input)


def _captured_tensor(record: _Record, tap: Tap) -> Tensor:
    """The tensor that the hooks captured for ``tap``."""
    calls, values = record.calls[tap.text], record.values[tap.text]
    if not calls:
        raise ModelError(
            f"{tap.text!r} has no value in this forward pass",
            remedy="the module did not run, or the model was compiled and first run without this tap: "
            "tap it before the first run, or leave train.compile out",
        )
    if tap.call is None and calls > 1:
        rest = tap.text[len(tap.path) :]
        raise ModelError(
            f"{tap.path!r} ran {calls} times in one forward pass",
            where=f"tap {tap.text!r}",
            remedy=f"name the call: {tap.path}@0{rest} is the first, {tap.path}@{calls - 1}{rest} the last",
        )
    if len(values) < max(1, -(tap.call or 0)):
        raise ModelError(
            f"{tap.path!r} ran {calls} times in one forward pass: there is no call {tap.call}",
            where=f"tap {tap.text!r}",
            remedy=f"calls are {tap.path}@0 to {tap.path}@{calls - 1}",
        )
    value = values[0]
    if isinstance(value, str):
        remedy = "checkpoint with use_reentrant=False" if value is _REENTRANT else "`tutelage taps` lists all taps"
        raise ModelError(value, where=f"tap {tap.text!r}", remedy=remedy)
    return value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` in evaluation mode; afterwards each module has its previous mode."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


def compile_apart(model: nn.Module, **options: Any) -> None:
    """``torch.compile`` a model in place, with a graph of its own; add its taps before.

    ``model.compile()`` shares graphs among all models of a class and ignores their taps: a model with taps would run
    the graph of one without.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    run.__code__ = run.__code__.replace()  # torch caches graphs by code object
    model._compiled_call_impl = torch.compile(run, **options)


def observe(model: nn.Module, inputs: Tensor | Mapping[str, Tensor], needs: Needs | None) -> Observation:
    """Run ``model`` once, as :class:`Observer`; with ``needs=None`` it is not run and the observation is empty."""
    if needs is None:
        return Observation()
    with Observer(model, needs) as observer:
        return observer(inputs)
