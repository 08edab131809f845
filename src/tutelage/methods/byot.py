"""Self-distillation inside one network: its deepest classifier teaches exits at its stages."""

from typing import Any

from torch import Tensor, nn

from tutelage import losses
from tutelage.config.methods.teacherless import ByotOptions
from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.methods.base import Method, Term
from tutelage.students import eval_no_grad, find_embedding_tap, find_stages
from tutelage.students.projectors import Shape, device_of
from tutelage.taps import Needs, Observation, find_module, observe, output_head
from tutelage.teachers.signal import Signal


class ByotMethod(Method):
    r"""Be your own teacher: cross-entropy and, for each exit i, a mixture of labels and the network's own logits.

    Exit i adds :math:`(1-\alpha)\,\mathrm{CE}(y, p_i) + \alpha\,\mathrm{KL}(p \| p_i) + \lambda\,\|F_i - F\|_2^2`,
    with both p of the KL at T. The network's p, and F, the input of its head, get no gradient from that. An exit is
    a bottleneck, which brings a stage's map to the size and channels of the last one and averages it to :math:`F_i`,
    and a linear classifier. Exits are trained and measured, but not exported: the student stays the plain network.

    There is no :math:`T^2`, as in the authors' code: :func:`tutelage.losses.kd` has it, so the term ``kd`` weighs
    :math:`\alpha / T^2`. And :func:`tutelage.losses.hint` is a mean over the D elements, so ``hint`` weighs
    :math:`\lambda D`. Images without a label train the exits alone.

    Reference: Zhang et al., Be Your Own Teacher (ICCV 2019), section 3. Defaults are those of the authors' later code
    for CIFAR-100 (alpha 0.3, T 3, lambda 0.03). In it lambda belongs to the distance, not to its square as in the
    paper and here; features go through one more linear layer, and the shallowest exit has none of it.
    """

    Options = ByotOptions
    options: ByotOptions
    needs = None
    tasks = ("classes",)

    def __init__(self, options: ByotOptions | None = None, /, **keywords: Any) -> None:
        super().__init__(options, **keywords)
        self.taps: list[str] = []
        self.deepest = ""
        self.exits = nn.ModuleList()
        self.weights = {"ce": 1.0}

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Find the exits and build their bottlenecks and classifiers.

        Raises:
            ModelError: an unknown tap, a student without stages, or one that does not classify whole samples.
        """
        self.taps, self.deepest = self._find_exits(student, example), find_embedding_tap(student)
        with eval_no_grad(student):
            inputs = example.to(device_of(student)).inputs
            seen = observe(student, inputs, Needs(hidden=(*self.taps, self.deepest)))
        feature, classes = seen.hidden[self.deepest], output_head(student).out_features
        if feature.ndim != 2:
            raise ModelError(
                f"the input of the student's head is {tuple(feature.shape)}, and not one vector for each sample",
                remedy="byot is for classifiers of whole samples",
            )
        last = list(find_stages(student, example))
        size = last[-1] if last else (1, 1)
        signed = bool((feature < 0).any())
        exits = []
        for tap in self.taps:
            shape = tuple(seen.hidden[tap].shape)
            if len(shape) not in (2, 4):
                raise ModelError(
                    f"{tap!r} gives {shape}: an exit is at a map [B, C, H, W] or a vector [B, D]",
                    where="method.exits", remedy="`tutelage taps` lists the taps and their shapes",
                )  # fmt: skip
            exits.append(Exit(shape, size, feature.shape[1], classes, factor=self.options.factor, signed=signed))
        self.exits = nn.ModuleList(exits)
        self.student_needs = Needs(hidden=(*self.taps, self.deepest))
        soft, hint = self.options.alpha / self.options.temperature**2, self.options.hint * feature.shape[1]
        self.weights = {"ce": 1.0}
        for tap in self.taps:
            self.weights |= {f"ce({tap})": 1.0 - self.options.alpha, f"kd({tap})": soft, f"hint({tap})": hint}

    def _find_exits(self, student: nn.Module, example: Batch) -> list[str]:
        """The taps of the exits."""
        if self.options.exits is not None:
            for tap in self.options.exits:
                try:
                    find_module(student, tap)
                except ModelError as error:
                    raise ModelError(error.what, where="method.exits", remedy=error.remedy) from None
            return self.options.exits
        paths = list(find_stages(student, example).values())[:-1]
        if not paths:
            raise ModelError(
                f"{type(student).__name__} has feature maps of one resolution only; an exit needs an earlier one",
                where="method.exits",
                remedy="use a student with stages, or name the modules: exits: [TAP, ...]",
            )
        return paths

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Of ``ce``: samples with a label; of ``kd`` and ``hint``: those that count."""
        labelled, counted = batch.labelled().sum(), batch.counted().sum()
        return {name: labelled if name.startswith("ce") else counted for name in self.weights}

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """``ce`` of the network, and ``ce``, ``kd`` and ``hint`` of each exit by its tap."""
        assert student.logits is not None
        teacher_logits, feature = student.logits.detach(), student.hidden[self.deepest].detach()
        sums = {"ce": losses.cross_entropy(student.logits, batch.labels, mask=batch.mask, reduction="sum")}
        for tap, exit_head in zip(self.taps, self.exits, strict=True):
            mine, logits = exit_head(student.hidden[tap])
            sums[f"ce({tap})"] = losses.cross_entropy(logits, batch.labels, mask=batch.mask, reduction="sum")
            sums[f"kd({tap})"] = losses.kd(
                logits, teacher_logits, temperature=self.options.temperature, mask=batch.mask, reduction="sum"
            )
            sums[f"hint({tap})"] = losses.hint(mine, feature, mask=batch.mask, reduction="sum")
        counts = self.counts(batch)
        return {name: Term(total, counts[name]) for name, total in sums.items()}

    def auxiliary_models(self, student: nn.Module) -> dict[str, nn.Module]:
        """The student with the logits of each exit, from shallow to deep."""
        pairs = zip(self.taps, self.exits, strict=True)
        return {f"exit-{i}": EarlyExit(student, tap, exit_head) for i, (tap, exit_head) in enumerate(pairs, 1)}

    def formula(self) -> str:
        """The loss in one line."""
        soft, hint = (
            f"{self.options.alpha / self.options.temperature**2:.3g} * kd(T={self.options.temperature:g})",
            f"{self.options.hint:g}",
        )
        where = ", ".join(self.taps or self.options.exits or ["auto"])
        if self.taps:
            hint = f"{self.weights[f'hint({self.taps[0]})']:.3g}"
        return f"1 * ce + at {where}: {1 - self.options.alpha:g} * ce + {soft} + {hint} * hint"


class Exit(nn.Module):
    """A bottleneck from a stage to what goes into the head, and a classifier of its own.

    Args:
        shape: of the stage's feature, ``[B, C, H, W]`` or ``[B, D]``.
        size: height and width of the last stage's map, to which a map is brought.
        outputs: width of what goes into the network's head.
        classes: rows of the classifier.
        factor: by how much the bottleneck is narrower than ``outputs``.
        signed: whether what goes into the head can be negative; the bottleneck's last layer then is linear.
    """

    def __init__(
        self, shape: Shape, size: tuple[int, int], outputs: int, classes: int, *, factor: int, signed: bool
    ) -> None:
        super().__init__()
        middle = max(outputs // factor, 1)
        body: list[nn.Module] = []
        if len(shape) == 4:
            stride = max(min(round(shape[2] / size[0]), round(shape[3] / size[1])), 1)
            kernel = stride if stride > 1 else 3  # each pixel is read once; at the same size, with its neighbours
            for channels, out, k, s in ((shape[1], middle, 1, 1), (middle, middle, kernel, stride)):
                conv = nn.Conv2d(channels, out, k, stride=s, padding=1 if k == 3 and s == 1 else 0, bias=False)
                body += [conv, nn.BatchNorm2d(out), nn.ReLU()]
            body += [nn.Conv2d(middle, outputs, 1)] if signed else [
                nn.Conv2d(middle, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            ]  # fmt: skip
        else:
            body += [nn.Linear(shape[1], middle), nn.LayerNorm(middle), nn.ReLU(), nn.Linear(middle, outputs)]
            body += [] if signed else [nn.ReLU()]
        self.bottleneck, self.head = nn.Sequential(*body), nn.Linear(outputs, classes)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, outputs]``, which is compared with what goes into the network's head, and logits ``[B, classes]``."""
        x = self.bottleneck(feature)
        x = x.mean((2, 3)) if x.ndim == 4 else x
        return x, self.head(x)


class EarlyExit(nn.Module):
    """The network up to an exit, with the logits of the exit."""

    def __init__(self, student: nn.Module, tap: str, exit_head: nn.Module) -> None:
        super().__init__()
        self.student, self.tap, self.exit_head = student, tap, exit_head

    def forward(self, inputs: Tensor | None = None, **named: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        seen = observe(self.student, named if inputs is None else inputs, Needs(logits=False, hidden=(self.tap,)))
        logits: Tensor = self.exit_head(seen.hidden[self.tap])[1]
        return logits
