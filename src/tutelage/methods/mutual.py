"""Students that teach each other, without a teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tutelage import losses
from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError, ConfigError
from tutelage.methods.base import Method, Term
from tutelage.students import eval_no_grad
from tutelage.taps import Needs, Observation, observe
from tutelage.teachers.signal import Signal

Peer = Mapping[str, Any] | Callable[[], nn.Module] | None


class MutualMethod(Method):
    r"""Deep mutual learning, and co-distillation: K students learn from the labels and from each other.

    Student k minimises :math:`\mathrm{CE}(y, p_k) + \tfrac{w}{K-1} \sum_{j \ne k} T^2\,\mathrm{KL}(p_j \| p_k)`,
    where the others' :math:`p_j` get no gradient. The sum of all K losses is minimised in one step: each student's
    gradient is that of its own loss alone. Images without a label are learned from the peers.

    Updates are simultaneous. Zhang et al. update the students in turn, each by predictions renewed after the update
    before; to first order in the learning rate the two are the same, and one step of one optimizer keeps what a
    training has: split batches, several processes, a clipped gradient (of all students together) and a resume to the
    same bits. It also takes K forward passes a step and not 2K - 1.

    The student of the run is one of the K, and starts from the baseline student's weights. The others are parts of
    the method while it is trained; a run saves and measures them beside the student, with the weights that they had
    when the student was best on validation.

    Args:
        peers: the others: how many copies of the student's architecture, each with an initialisation of its own; or
            a list with ``None`` for such a copy, a function that makes a module, or (in a recipe) a model's section.
        temperature: T, above 0.
        weight: w.
        target: ``each``: the mean of the losses to each peer; ``mean``: the loss to the mean of their probabilities.
        refresh: learn from copies of the peers that are renewed every so many steps, in evaluation mode, as workers
            do that read each other's checkpoints. Default: from the peers as they are.
        burn_in: share of the steps in which the labels alone are learned, in [0, 1).

    Raises:
        ConfigError: a value out of range.

    Reference: Zhang et al., Deep Mutual Learning (CVPR 2018), section 3, at T = 1 and w = 1. Anil et al.,
    Large scale distributed neural network training through online distillation (ICLR 2018), algorithm 1:
    codistillation, with ``target="mean"``, ``refresh`` and ``burn_in``; its cross-entropy with the mean differs from
    this loss by a constant.
    """

    needs = None

    def __init__(
        self,
        peers: int | Sequence[Peer] = 1,
        *,
        temperature: float = 1.0,
        weight: float = 1.0,
        target: Literal["each", "mean"] = "each",
        refresh: int | None = None,
        burn_in: float = 0.0,
    ) -> None:
        super().__init__()
        given: list[Peer] = [None] * peers if isinstance(peers, int) else list(peers)
        for name, value, right, remedy in (
            ("peers", peers, len(given) > 0, "at least one: the student needs at least one peer"),
            ("temperature", temperature, temperature > 0, "must be above 0; the paper has 1"),
            ("weight", weight, weight >= 0, "must be 0 or more; the paper has 1"),
            ("target", target, target in ("each", "mean"), "allowed: each, mean"),
            (
                "refresh",
                refresh,
                refresh is None or refresh >= 1,
                "a number of steps; none: live peers",
            ),
            ("burn_in", burn_in, 0.0 <= burn_in < 1.0, "a share of all steps, from 0 to below 1"),
        ):
            if not right:
                raise ConfigError(f"{name}={value!r}", remedy=remedy)
        self.peers, self.temperature, self.weight, self.target = given, temperature, weight, target
        self.refresh, self.burn_in = refresh, burn_in
        self.members, self.stale = nn.ModuleList(), nn.ModuleList()
        self.names = ["", *(f"({name})" for name in self._named())]
        self.weights = {f"{term}{of}": w for of in self.names for term, w in (("ce", 1.0), ("mutual", weight))}
        self._student: list[nn.Module] = []  # a list, for what a module holds becomes a part of it
        self._step, self._total = 0, 0

    def _named(self) -> list[str]:
        return [f"peer-{i}" for i in range(1, len(self.peers) + 1)]

    def add_peers(self, models: Sequence[nn.Module]) -> None:
        """Take in the other students."""
        self.members = nn.ModuleList(models)

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Look at the peers, and make their stale copies where there are to be any.

        Raises:
            ConfigError: two students start with the same weights, and would stay the same for ever.
        """
        if len(self.members) != len(self.peers):
            raise ConfigError(
                f"{len(self.peers)} peers are to be trained with the student, and {len(self.members)} have joined",
                remedy="call join() with a model for each",
            )
        students = [student, *self.members]
        for i, later in enumerate(students):
            for j, earlier in enumerate(students[:i]):
                if _same(earlier, later):
                    raise ConfigError(
                        f"peer {i} starts with the very weights of {f'peer {j}' if j else 'the student'}: they have "
                        "nothing to teach each other",
                        where="method.peers",
                        remedy="start them differently: no checkpoint for one of them in a recipe; in Python, "
                        "student=FUNCTION that makes a new module, or peers=[FUNCTION, ...]",
                    )
        if self.refresh is not None:
            self.stale = nn.ModuleList([copy.deepcopy(model) for model in students]).requires_grad_(False)

    def before_training(self, student: nn.Module, step: int, total: int) -> None:
        """Note where the training is, and whose weights are to be copied."""
        self._student, self._step, self._total = [student], step, total

    def after_step(self) -> None:
        """Renew the stale copies when they are due."""
        self._step += 1
        if self.refresh is not None and self._step % self.refresh == 0:
            for old, new in zip(self.stale, [*self._student, *self.members], strict=True):
                _copy(new, old)

    def auxiliary_models(self, student: nn.Module) -> dict[str, nn.Module]:
        """The peers."""
        return dict(zip(self._named(), self.members, strict=True))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Of each student, ``ce``: positions with a label; ``mutual``: positions that count."""
        count = {"ce": batch.labelled().sum(), "mutual": batch.counted().sum()}
        return {f"{term}{of}": count[term] for of in self.names for term in ("ce", "mutual")}

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """For each student the terms ``ce`` and ``mutual``; the latter is zero while they burn in.

        Raises:
            CapabilityError: two students score different numbers of classes.
        """
        assert student.logits is not None
        logits = [student.logits, *(_logits(member, batch) for member in self.members)]
        for name, z in zip(self._named(), logits[1:], strict=True):
            if z.shape != logits[0].shape:
                raise CapabilityError(
                    f"the student's logits are {tuple(logits[0].shape)}, those of {name} {tuple(z.shape)}",
                    remedy="all must score the same classes in the same order",
                )
        said = None if self._step < self.burn_in * self._total else self._said(logits, batch)
        counts, terms = self.counts(batch), {}
        for i, (of, z) in enumerate(zip(self.names, logits, strict=True)):
            ce = losses.cross_entropy(z, batch.labels, mask=batch.mask, reduction="sum")
            terms[f"ce{of}"] = Term(ce, counts[f"ce{of}"])
            soft = torch.zeros_like(ce) if said is None else self._soft(z, said[:i] + said[i + 1 :], batch)
            terms[f"mutual{of}"] = Term(soft, counts[f"mutual{of}"])
        return terms

    def _said(self, logits: list[Tensor], batch: Batch) -> list[Tensor]:
        """The logits of each student as the others hear them."""
        if self.refresh is None:
            return [z.detach() for z in logits]
        found = []
        for model in self.stale:
            with eval_no_grad(model):
                found.append(_logits(model, batch))
        return found

    def _soft(self, mine: Tensor, theirs: list[Tensor], batch: Batch) -> Tensor:
        if self.target == "mean" and len(theirs) > 1:
            theirs = [self.mean(theirs)]
        peer_losses = [
            losses.kd(mine, z, temperature=self.temperature, mask=batch.mask, reduction="sum") for z in theirs
        ]
        return torch.stack(peer_losses).mean()

    def mean(self, logits: Sequence[Tensor]) -> Tensor:
        """Logits whose probabilities at T are the mean of those of ``logits`` at T."""
        logs = torch.stack([torch.log_softmax(z.float() / self.temperature, -1) for z in logits])
        return self.temperature * (logs.logsumexp(0) - math.log(len(logits)))

    def formula(self) -> str:
        """The loss in one line."""
        shown = [f"T={self.temperature:g}", f"target={self.target}"]
        shown += [f"refresh={self.refresh}"] if self.refresh is not None else []
        shown += [f"burn_in={self.burn_in:g}"] if self.burn_in else []
        return f"{1 + len(self.peers)} students, each 1 * ce + {self.weight:g} * mutual({', '.join(shown)})"


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    found = observe(model, batch.inputs, Needs()).logits
    assert found is not None
    return found


def _same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same weights under the same names."""
    mine, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return mine.keys() == theirs.keys() and all(torch.equal(v.cpu(), theirs[k].cpu()) for k, v in mine.items())


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    """Parameters and buffers of one model into another of the same architecture, in place."""
    for theirs, mine in zip(source.parameters(), target.parameters(), strict=True):
        mine.copy_(theirs)
    for old, new in zip(target.buffers(), source.buffers(), strict=True):
        old.copy_(new)
