"""Several teachers that speak as one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Literal, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError, DataError, ModelError
from tutelage.taps import Needs, logits_of
from tutelage.teachers.signal import Signal, Teacher

Combine = Literal["probabilities", "logits"]


class EnsembleTeacher:
    """Teachers, live or remembered in any mix, whose word is the mean of theirs.

    - ``probabilities``: the log of the weighted mean of the members' probabilities, ``log sum_m w_m softmax(z_m)``.
      Log-probabilities are logits: their softmax at T = 1 is that mean exactly. At the T of a method they are
      softened as any logits are, to the mean raised to 1/T and normalised, which is not the mean of the members'
      softened probabilities. With ``temperature=T`` it is: ``T log sum_m w_m softmax(z_m / T)``, whose softmax at
      this T is the mean of what each member says at T.
    - ``logits``: the weighted mean of the logits, which is the geometric mean of the probabilities, normalised.

    Hidden states are those of one member, by its number: ``0.stages.1`` is ``stages.1`` of the first.

    Args:
        members: at least one; all score the same classes in the same order.
        combine: what the mean is of.
        weights: one for each member, none negative; only their ratios matter. Default: all the same.
        temperature: T at which probabilities are averaged.
        route: for each value of ``batch.route`` the numbers of the members that teach such a sample, by their weights
            among each other. Default: all members teach every sample. A member is asked for its own samples only.

    Raises:
        CapabilityError: no members, weights or routes that do not fit them, or nothing that teaches some value.
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
            raise CapabilityError("an ensemble without members", remedy="give at least one teacher")
        if combine not in ("probabilities", "logits"):
            raise CapabilityError(f"unknown combine={combine!r}", remedy="allowed: probabilities, logits")
        if not 0 < temperature < math.inf:
            raise CapabilityError(f"temperature={temperature} of an ensemble", remedy="must be above 0")
        self.combine, self.temperature = combine, temperature
        self.weights = normalise_weights(weights, len(self.members))
        self.route = None if route is None else [sorted(set(those)) for those in route]
        self._table = torch.tensor([self.weights]) if self.route is None else self._routed(self.route)
        each = [member.provides for member in self.members]
        hidden = self.route is None and any("hidden" in provides for provides in each)
        logits = all("logits" in provides for provides in each)
        self.provides = frozenset(name for name, has in (("logits", logits), ("hidden", hidden)) if has)

    def _routed(self, route: Sequence[Sequence[int]]) -> Tensor:
        table = torch.zeros(len(route), len(self.members))
        for value, those in enumerate(route):
            if any(not 0 <= m < len(self.members) for m in those):
                raise CapabilityError(
                    f"route {value} names members {list(those)}, there are {len(self.members)}",
                    remedy="members are numbered from 0",
                )
            mine = torch.tensor([self.weights[m] for m in those])
            if not len(those) or float(mine.sum()) == 0:
                raise CapabilityError(
                    f"no member teaches the samples of route {value}", remedy="give it a member with a weight above 0"
                )
            table[value, list(those)] = mine / mine.sum()
        return table

    @cached_property
    def model(self) -> Ensemble:
        """The members' models as one module, in which a member's parts have the paths of its taps.

        Raises:
            CapabilityError: a member is not live.
        """
        found = [getattr(member, "model", None) for member in self.members]
        models = [model for model in found if isinstance(model, nn.Module)]
        if len(models) != len(found):
            raise CapabilityError(
                "a member of the ensemble has no model in this process", remedy="use live members for this"
            )
        return Ensemble(models, combine=self.combine, weights=self.weights, temperature=self.temperature)

    def to(self, device: torch.device | str) -> Self:
        """This teacher, the models of its live members moved to ``device``."""
        for member in self.members:
            if callable(move := getattr(member, "to", None)):
                move(device)
        return self

    def close(self) -> None:
        """Close the members that can be closed."""
        for member in self.members:
            if callable(close := getattr(member, "close", None)):
                close()

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """The members' word on the batch, as one.

        Raises:
            CapabilityError: more is needed than the members give, they score different numbers of classes, or the
                batch does not say which members teach it.
        """
        if needs.head:
            raise CapabilityError("an ensemble has no output head", remedy="use a single teacher")
        taps = self._taps(needs.hidden)
        weights = self._weights(batch)
        total: Tensor | None = None
        hidden: dict[str, Tensor] = {}
        for m, member in enumerate(self.members):
            mine = weights[:, m]
            rows = None if self.route is None else (mine > 0).nonzero().flatten()
            silent = float(self.weights[m]) == 0 or (rows is not None and len(rows) == 0)
            logits = needs.logits and not silent
            if not logits and m not in taps:
                continue
            asked = batch if rows is None or len(rows) == len(batch) else batch.take(rows)
            said = member.signal(asked, Needs(logits=logits, hidden=tuple(taps.get(m, {}))))
            hidden |= {name: said.hidden[tap] for tap, name in taps.get(m, {}).items()}
            if not logits:
                continue
            scores = said.dense().float()
            if total is None:
                shape = (len(batch), *scores.shape[1:])
                total = scores.new_full(shape, -math.inf if self.combine == "probabilities" else 0.0)
            if scores.shape[1:] != total.shape[1:]:
                raise CapabilityError(
                    f"member {m} gives logits {tuple(scores.shape[1:])} for a sample, those before it "
                    f"{tuple(total.shape[1:])}",
                    remedy="all members must score the same classes in the same order",
                )
            w = (mine if rows is None else mine[rows]).to(scores.device).view(-1, *[1] * (scores.ndim - 1))
            if asked is batch:
                total = self._added(total, scores, w)
            else:
                assert rows is not None
                rows = rows.to(scores.device)
                total[rows] = self._added(total[rows], scores, w)
        if total is not None and self.combine == "probabilities":
            total = self.temperature * total
        return Signal(total, {name: hidden[name] for name in needs.hidden})

    def _added(self, total: Tensor, scores: Tensor, weight: Tensor) -> Tensor:
        if self.combine == "logits":
            return total + weight * scores
        return torch.logaddexp(total, F.log_softmax(scores / self.temperature, dim=-1) + weight.log())

    def _weights(self, batch: Batch) -> Tensor:
        """``[B, M]``, or ``[1, M]`` where all samples have the same."""
        if self.route is None:
            return self._table
        if batch.route is None:
            raise CapabilityError(
                "the batch does not say which members teach its samples",
                remedy="set data.route, or yield batches with route=",
            )
        chosen = batch.route.cpu()
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(self._table):
            raise CapabilityError(
                f"routes from {int(chosen.min())} to {int(chosen.max())} in a batch, known are 0 to "
                f"{len(self._table) - 1}",
                remedy="give members for every value of the column",
            )
        return self._table[chosen]

    def _taps(self, hidden: Sequence[str]) -> dict[int, dict[str, str]]:
        """For each member its own taps, and how they are called here."""
        found: dict[int, dict[str, str]] = {}
        if hidden and self.route is not None:
            raise CapabilityError(
                "hidden states of members that each teach some samples only",
                remedy="use a method on logits, or leave route out",
            )
        for name in hidden:
            number, dot, tap = name.partition(".")
            if not dot or not number.isdecimal() or int(number) >= len(self.members):
                raise ModelError(
                    f"{name!r} is no tap of an ensemble of {len(self.members)}",
                    remedy=f"put the member's number first, as in 0.{tap if dot and number.isdecimal() else name}",
                )
            found.setdefault(int(number), {})[tap] = name
        return found


class Ensemble(nn.ModuleList):
    """Models as one module that gives their combined logits; what :class:`EnsembleTeacher` says without routes.

    The first model's module ``head`` is ``0.head`` here.
    """

    many = True
    """No method can choose a place in several models by itself."""

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

    def forward(self, inputs: Tensor | None = None, **named: Tensor) -> Tensor:
        """Logits ``[..., C]``."""
        said = []
        for model in self:
            first = next(model.parameters(), None)
            place = None if first is None else first.device  # members may have a device each
            given = {name: x.to(place) for name, x in named.items()}
            said.append(logits_of(model(**given) if inputs is None else model(inputs.to(place))).float())
        device = said[0].device
        scores = torch.stack([s.to(device) for s in said])
        weights = torch.tensor(self.weights, device=device).view(-1, *[1] * (scores.ndim - 1))
        if self.combine == "logits":
            return (weights * scores).sum(0)
        logs = F.log_softmax(scores / self.temperature, dim=-1) + weights.log()
        return self.temperature * logs.logsumexp(0)

    def get_classifier(self) -> NoReturn:
        """There is no one output head.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            f"an ensemble of {len(self)} has no output head", remedy="use a single teacher, or a method on logits"
        )


def normalise_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights that sum to 1; all the same where none are given.

    Raises:
        CapabilityError: another number of them than ``count``, one that is negative or not finite, or all zero.
    """
    if weights is None:
        return [1 / count] * count
    given = [float(w) for w in weights]
    if len(given) != count:
        raise CapabilityError(f"{len(given)} weights for {count} members", remedy="give one for each member")
    if not all(0 <= w < math.inf for w in given) or sum(given) == 0:
        raise CapabilityError(f"weights {given}", remedy="none may be negative, and not all 0")
    return [w / sum(given) for w in given]


def fit_ensemble_weights(
    members: Sequence[Teacher],
    batches: Iterable[Batch],
    *,
    combine: Combine = "probabilities",
    temperature: float = 1.0,
    device: torch.device | str = "cpu",
) -> list[float]:
    """Weights, a softmax of one number a member, that minimise the ensemble's cross-entropy with the labels.

    Deterministic: from equal weights, by L-BFGS in float64 on the CPU.

    Args:
        members: of the ensemble.
        batches: labelled samples that neither students nor members are trained or tested on.
        combine: as in :class:`EnsembleTeacher`.
        temperature: as there.
        device: where members compute.

    Raises:
        DataError: no sample has a label.
    """
    kept: list[Tensor] = []
    targets: list[Tensor] = []
    picks = combine == "probabilities" and temperature == 1.0  # then the probability of the label is all that counts
    for batch in batches:
        here = batch.to(device)
        counted = here.labelled()
        labels = here.labels[counted]
        said = torch.stack([member.signal(here, Needs()).dense().float()[counted] for member in members])
        if combine == "probabilities":
            said = F.log_softmax(said / temperature, dim=-1)
        if picks:
            said = said.gather(-1, labels.expand(len(said), -1).unsqueeze(-1))
        kept.append(said.double().cpu())
        targets.append(labels.cpu())
    if not sum(map(len, targets)):
        raise DataError(
            "no sample of the validation data has a label to learn the members' weights from",
            remedy="give weights by hand, or validation data with labels",
        )
    values, labels = torch.cat(kept, dim=1), torch.cat(targets)
    free = torch.zeros(len(members), 1, 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([free], max_iter=200, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        logs = free.log_softmax(0)
        mixed = (logs.exp() * values).sum(0) if combine == "logits" else (logs + values).logsumexp(0)
        return (
            -mixed.mean() if picks else F.cross_entropy(temperature * mixed if combine != "logits" else mixed, labels)
        )

    def closure() -> Tensor:
        solver.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(closure)
    found: list[float] = free.detach().softmax(0).flatten().tolist()
    return found
