"""Students that teach each other, without a teacher."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tutelage import losses
from tutelage.config.methods.teacherless import MutualOptions
from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError, ConfigError
from tutelage.methods.base import Method, Term
from tutelage.students import eval_no_grad
from tutelage.taps import Needs, Observation, observe
from tutelage.teachers.signal import Signal


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

    Reference: Zhang et al., Deep Mutual Learning (CVPR 2018), section 3, at T = 1 and w = 1. Anil et al.,
    Large scale distributed neural network training through online distillation (ICLR 2018), algorithm 1:
    codistillation, with ``target="mean"``, ``refresh`` and ``burn_in``; its cross-entropy with the mean differs from
    this loss by a constant.
    """

    Options = MutualOptions
    options: MutualOptions
    needs = None
    tasks = ("classes",)

    def __init__(self, options: MutualOptions | None = None, /, **keywords: Any) -> None:
        super().__init__(options, **keywords)
        self.peers = self.options.peers
        self.members, self.stale = nn.ModuleList(), nn.ModuleList()
        self.names = ["", *(f"({name})" for name in self._peer_names())]
        weights = {"ce": 1.0, "mutual": self.options.weight}
        self.weights = {f"{term}{of}": weight for of in self.names for term, weight in weights.items()}
        self._student: list[nn.Module] = []  # in a list, so that the student is no submodule
        self._step, self._total = 0, 0

    def _peer_names(self) -> list[str]:
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
                f"{len(self.peers)} peers train with the student, and add_peers() got {len(self.members)} models",
                remedy="call add_peers() with a model for each",
            )
        students = [student, *self.members]
        for i, later in enumerate(students):
            for j, earlier in enumerate(students[:i]):
                if _same(earlier, later):
                    raise ConfigError(
                        f"peer {i} starts with the same weights as {f'peer {j}' if j else 'the student'}, "
                        "so they cannot learn from each other",
                        where="method.peers",
                        remedy="use different initial weights: remove one checkpoint, or pass functions in Python",
                    )
        if self.options.refresh is not None:
            self.stale = nn.ModuleList([copy.deepcopy(model) for model in students]).requires_grad_(False)

    def before_training(self, student: nn.Module, step: int, total: int) -> None:
        """Note where the training is, and whose weights are to be copied."""
        self._student, self._step, self._total = [student], step, total

    def after_step(self) -> None:
        """Renew the stale copies when they are due."""
        self._step += 1
        if self.options.refresh is not None and self._step % self.options.refresh == 0:
            for old, new in zip(self.stale, [*self._student, *self.members], strict=True):
                _copy(new, old)

    def auxiliary_models(self, student: nn.Module) -> dict[str, nn.Module]:
        """The peers."""
        return dict(zip(self._peer_names(), self.members, strict=True))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Of each student, ``ce``: positions with a label; ``mutual``: positions that count."""
        count = {"ce": batch.labelled().sum(), "mutual": batch.counted().sum()}
        return {f"{term}{of}": count[term] for of in self.names for term in ("ce", "mutual")}

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """For each student the terms ``ce`` and ``mutual``; the latter is zero while they burn in.

        Raises:
            CapabilityError: two students score different numbers of classes.
        """
        assert student.logits is not None
        logits = [student.logits, *(_logits(member, batch) for member in self.members)]
        for name, z in zip(self._peer_names(), logits[1:], strict=True):
            if z.shape != logits[0].shape:
                raise CapabilityError(
                    f"the student's logits are {tuple(logits[0].shape)}, those of {name} {tuple(z.shape)}",
                    remedy="all must score the same classes in the same order",
                )
        peer_logits = (
            None if self._step < self.options.burn_in * self._total else self._logits_for_peers(logits, batch)
        )
        counts, terms = self.counts(batch), {}
        for i, (of, z) in enumerate(zip(self.names, logits, strict=True)):
            ce = losses.cross_entropy(z, batch.labels, mask=batch.mask, reduction="sum")
            terms[f"ce{of}"] = Term(ce, counts[f"ce{of}"])
            soft = (
                torch.zeros_like(ce)
                if peer_logits is None
                else self._soft(z, peer_logits[:i] + peer_logits[i + 1 :], batch)
            )
            terms[f"mutual{of}"] = Term(soft, counts[f"mutual{of}"])
        return terms

    def _logits_for_peers(self, logits: list[Tensor], batch: Batch) -> list[Tensor]:
        """The logits of each student that its peers learn from."""
        if self.options.refresh is None:
            return [z.detach() for z in logits]
        logits_of_copies = []
        for model in self.stale:
            with eval_no_grad(model):
                logits_of_copies.append(_logits(model, batch))
        return logits_of_copies

    def _soft(self, mine: Tensor, theirs: list[Tensor], batch: Batch) -> Tensor:
        if self.options.target == "mean" and len(theirs) > 1:
            theirs = [self.mean(theirs)]
        peer_losses = [
            losses.kd(mine, z, temperature=self.options.temperature, mask=batch.mask, reduction="sum") for z in theirs
        ]
        return torch.stack(peer_losses).mean()

    def mean(self, logits: Sequence[Tensor]) -> Tensor:
        """Logits whose probabilities at T are the mean of those of ``logits`` at T."""
        logs = torch.stack([torch.log_softmax(z.float() / self.options.temperature, -1) for z in logits])
        return self.options.temperature * (logs.logsumexp(0) - math.log(len(logits)))

    def formula(self) -> str:
        """The loss in one line."""
        settings = [f"T={self.options.temperature:g}", f"target={self.options.target}"]
        settings += [f"refresh={self.options.refresh}"] if self.options.refresh is not None else []
        settings += [f"burn_in={self.options.burn_in:g}"] if self.options.burn_in else []
        return (
            f"{1 + len(self.peers)} students, each 1 * ce + {self.options.weight:g} * mutual({', '.join(settings)})"
        )


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits = observe(model, batch.inputs, Needs()).logits
    assert logits is not None
    return logits


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
