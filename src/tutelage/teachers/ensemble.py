"""Several teachers combined into one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.data.batch import Arguments, Batch
from tutelage.errors import CapabilityError, DataError, ModelError, shorten
from tutelage.taps import Needs, scores_of
from tutelage.teachers.signal import Signal, Teacher

Combine = Literal["probabilities", "logits"]


class EnsembleTeacher:
    """The mean of several teachers of any kind.

    - ``probabilities``: the log of the weighted mean of the members' probabilities at T = ``temperature``,
      ``T log sum_m w_m softmax(z_m / T)``. Its softmax at T is exactly the mean of the members' softened
      probabilities. At another temperature of a method it is softened like any logits, which is not that mean.
    - ``logits``: the weighted mean of the logits, which is the normalised geometric mean of the probabilities.

    Hidden states are those of one member, with its number first: ``0.stages.1`` is ``stages.1`` of the first member.

    Args:
        members: at least one; all score the same classes in the same order.
        combine: ``probabilities`` or ``logits``.
        weights: one for each member, not negative; only their ratios matter. Default: equal.
        temperature: T at which probabilities are averaged.
        route: for each value of ``batch.route`` the numbers of the members that teach such samples, by their relative
            weights. A member runs on its own samples only. Default: all members teach every sample.

    Raises:
        CapabilityError: no members; weights or routes that do not fit them; a route without a member.
    """

    def __init__(
        self,
        members: Sequence[Teacher],
        *,
        combine: Combine = "probabilities",
        weights: Sequence[float] | None = None,
        temperature: float = 1.0,
        route: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.members = list(members)
        if not self.members:
            raise CapabilityError("the ensemble has no members", remedy="give at least one teacher")
        if combine not in ("probabilities", "logits"):
            raise CapabilityError(f"unknown combine={combine!r}", remedy="allowed: probabilities, logits")
        if not 0 < temperature < math.inf:
            raise CapabilityError(f"the ensemble has temperature={temperature}", remedy="set it above 0")
        self.combine, self.temperature = combine, temperature
        self.weights = normalise_weights(weights, len(self.members))
        self.route = None if route is None else [sorted(set(numbers)) for numbers in route]
        self._table = torch.tensor([self.weights]) if self.route is None else self._route_weights(self.route)
        logits = all("logits" in member.provides for member in self.members)
        hidden = self.route is None and any("hidden" in member.provides for member in self.members)
        self.provides = frozenset(name for name, has in (("logits", logits), ("hidden", hidden)) if has)

    def _route_weights(self, route: Sequence[Sequence[int]]) -> Tensor:
        """``[R, M]`` weights of the members for each route; they sum to 1."""
        table = torch.zeros(len(route), len(self.members))
        for value, numbers in enumerate(route):
            if any(not 0 <= m < len(self.members) for m in numbers):
                raise CapabilityError(
                    f"route {value} names members {list(numbers)}, and the ensemble has {len(self.members)}",
                    remedy="number members from 0",
                )
            weights = torch.tensor([self.weights[m] for m in numbers])
            if not len(numbers) or float(weights.sum()) == 0:
                raise CapabilityError(
                    f"no member teaches the samples of route {value}", remedy="give it a member with a weight above 0"
                )
            table[value, list(numbers)] = weights / weights.sum()
        return table

    @cached_property
    def model(self) -> Ensemble:
        """The members' models as one module with the members' taps; raises :class:`CapabilityError` without them."""
        models = [m for member in self.members if isinstance(m := getattr(member, "model", None), nn.Module)]
        if len(models) != len(self.members):
            raise CapabilityError(
                "a member of the ensemble has no model in this process", remedy="use live members only"
            )
        return Ensemble(models, combine=self.combine, weights=self.weights, temperature=self.temperature)

    def to(self, device: torch.device | str) -> Self:
        """Move the models of live members to ``device``; returns the teacher."""
        for member in self.members:
            if callable(move := getattr(member, "to", None)):
                move(device)
        return self

    def close(self) -> None:
        """Close the members."""
        for member in self.members:
            if callable(close := getattr(member, "close", None)):
                close()

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """The combined logits and the members' hidden states for a batch.

        Raises:
            CapabilityError: more is needed than the members provide, they score different numbers of classes, or the
                batch has no routes.
        """
        if needs.head:
            raise CapabilityError("an ensemble has no output head", remedy="use a single teacher")
        taps = self._taps(needs.hidden)
        weights = self._weights(batch)
        total: Tensor | None = None
        hidden: dict[str, Tensor] = {}
        for m, member in enumerate(self.members):
            rows = (weights[:, m] > 0).nonzero().flatten()
            logits = needs.logits and len(rows) > 0
            if not logits and m not in taps:
                continue
            is_complete = self.route is None or len(rows) == len(batch)
            part = batch if is_complete else batch.take(rows)
            signal = member.signal(part.for_member(m), Needs(logits=logits, hidden=tuple(taps.get(m, {}))))
            hidden |= {name: signal.hidden[tap] for tap, name in taps.get(m, {}).items()}
            if not logits:
                continue
            scores = signal.dense().float()
            if total is None:
                shape = (len(batch), *scores.shape[1:])
                total = scores.new_full(shape, -math.inf if self.combine == "probabilities" else 0.0)
            if scores.shape[1:] != total.shape[1:]:
                raise CapabilityError(
                    f"member {m} gives logits {tuple(scores.shape[1:])} for a sample, and earlier members "
                    f"{tuple(total.shape[1:])}",
                    remedy="use members that score the same classes in the same order",
                )
            w = weights[rows, m].to(scores.device).view(-1, *[1] * (scores.ndim - 1))
            at = slice(None) if is_complete else rows.to(scores.device)
            if self.combine == "logits":
                total[at] += w * scores
            else:
                logs = F.log_softmax(scores / self.temperature, dim=-1)
                total[at] = torch.logaddexp(total[at], logs + w.log())
        if total is not None and self.combine == "probabilities":
            total = self.temperature * total
        return Signal(total, {name: hidden[name] for name in needs.hidden})

    def _weights(self, batch: Batch) -> Tensor:
        """``[B, M]`` weights of the members for each sample."""
        if self.route is None:
            return self._table.expand(len(batch), -1)
        if batch.route is None:
            raise CapabilityError(
                "the batch has no routes, and the members teach different samples",
                remedy="set data.route, or yield batches with route=",
            )
        route = batch.route.cpu()
        if len(route) and not 0 <= int(route.min()) <= int(route.max()) < len(self._table):
            raise CapabilityError(
                f"a batch has routes from {int(route.min())} to {int(route.max())}, and the ensemble has 0 to "
                f"{len(self._table) - 1}",
                remedy="give members for every value of the route column",
            )
        return self._table[route]

    def _taps(self, hidden: Sequence[str]) -> dict[int, dict[str, str]]:
        """For each member its own taps, with their names in the ensemble."""
        taps: dict[int, dict[str, str]] = {}
        if hidden and self.route is not None:
            raise CapabilityError(
                "an ensemble with routes provides no hidden states",
                remedy="use a method on logits, or remove route",
            )
        for name in hidden:
            number, dot, tap = name.partition(".")
            if not dot or not number.isdecimal() or int(number) >= len(self.members):
                raise ModelError(
                    f"{name!r} is not a tap of an ensemble of {len(self.members)}",
                    remedy=f"put the member's number first, as in 0.{tap if dot and number.isdecimal() else name}",
                )
            taps.setdefault(int(number), {})[tap] = name
        return taps


class Ensemble(nn.ModuleList):
    """Models as one module that gives their combined logits, as :class:`EnsembleTeacher` without routes.

    Module ``head`` of the first model is ``0.head`` here.
    """

    many = True  # a method cannot choose taps automatically

    def __init__(
        self,
        models: Iterable[nn.Module],
        *,
        combine: Combine = "probabilities",
        weights: Sequence[float] | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(models)
        self.combine, self.temperature = combine, temperature
        self.weights = normalise_weights(weights, len(self))

    def forward(self, *inputs: Any, **named: Tensor) -> Tensor:
        """Logits ``[..., C]``; inputs ``member_0`` ... are those of one member each."""
        logits = []
        several: Any = Arguments({str(i): x for i, x in enumerate(inputs)})
        given = named or (inputs[0] if len(inputs) == 1 else several)
        for number, model in enumerate(self):
            first = next(model.parameters(), None)
            own = None if first is None else first.device  # members can have different devices
            mine = named.get(f"member_{number}", given)
            moved = mine.to(own) if isinstance(mine, Tensor) else type(mine)({k: x.to(own) for k, x in mine.items()})
            logits.append(scores_of(model, moved).float())
        scores = torch.stack([x.to(logits[0].device) for x in logits])
        weights = torch.tensor(self.weights, device=scores.device).view(-1, *[1] * (scores.ndim - 1))
        if self.combine == "logits":
            return (weights * scores).sum(0)
        logs = F.log_softmax(scores / self.temperature, dim=-1) + weights.log()
        return self.temperature * logs.logsumexp(0)

    def get_classifier(self) -> NoReturn:
        """Raise :class:`ModelError`, since there is no single output head."""
        raise ModelError(
            f"an ensemble of {len(self)} has no output head", remedy="use a single teacher, or a method on logits"
        )


def normalise_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights that sum to 1, equal ones by default; raises :class:`CapabilityError` for unusable weights."""
    if weights is None:
        return [1 / count] * count
    values = [float(w) for w in weights]
    if len(values) != count:
        raise CapabilityError(f"{len(values)} weights for {count} members", remedy="give one for each member")
    if not all(0 <= w < math.inf for w in values) or sum(values) == 0:
        raise CapabilityError(
            f"unusable weights {shorten(values)}", remedy="give finite weights, none negative, not all 0"
        )
    return [w / sum(values) for w in values]


def fit_ensemble_weights(
    members: Sequence[Teacher],
    batches: Iterable[Batch],
    *,
    combine: Combine = "probabilities",
    temperature: float = 1.0,
    device: torch.device | str = "cpu",
) -> list[float]:
    """Weights that minimise the ensemble's cross-entropy with the labels: a softmax of one parameter per member.

    Deterministic: L-BFGS in float64 on the CPU, from equal weights.

    Args:
        members: of the ensemble; ``combine`` and ``temperature`` are as in :class:`EnsembleTeacher`.
        batches: labelled samples that neither students nor members are trained or tested on.
        device: where members run.

    Raises:
        DataError: no sample has a label.
    """
    parts: list[Tensor] = []
    targets: list[Tensor] = []
    labels_only = combine == "probabilities" and temperature == 1.0  # the loss then needs no other class
    for batch in batches:
        moved = batch.to(device)
        counted = moved.labelled()
        labels = moved.labels[counted]
        outputs = [member.signal(moved.for_member(i), Needs()).dense() for i, member in enumerate(members)]
        scores = torch.stack([x.float()[counted] for x in outputs])
        if combine == "probabilities":
            scores = F.log_softmax(scores / temperature, dim=-1)
        if labels_only:
            scores = scores.gather(-1, labels.expand(len(scores), -1).unsqueeze(-1))
        parts.append(scores.double().cpu())
        targets.append(labels.cpu())
    if not sum(map(len, targets)):
        raise DataError(
            "no sample of the validation data has a label to learn the members' weights from",
            remedy="set the weights, or give validation data with labels",
        )
    values, labels = torch.cat(parts, dim=1), torch.cat(targets)
    free = torch.zeros(len(members), 1, 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([free], max_iter=200, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        logs = free.log_softmax(0)
        if combine == "logits":
            loss = F.cross_entropy((logs.exp() * values).sum(0), labels)
        else:
            mean = (logs + values).logsumexp(0)
            loss = -mean.mean() if labels_only else F.cross_entropy(temperature * mean, labels)
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    weights: list[float] = free.detach().softmax(0).flatten().tolist()
    return weights
