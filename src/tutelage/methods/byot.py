"""Self-distillation inside one network: its deepest classifier teaches exits at its stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from tutelage import losses
from tutelage.data.batch import Batch
from tutelage.errors import ConfigError, ModelError
from tutelage.methods.base import Method, Term
from tutelage.students import eval_no_grad, find_embedding_tap, find_stages
from tutelage.students.projectors import Shape, device_of
from tutelage.taps import Needs, Observation, find_module, observe, output_head
from tutelage.teachers.signal import Signal


class ByotMethod(Method):
    r"""Be your own teacher: cross-entropy and, of each exit i, a mixture of labels and the network's own word.

    Exit i adds :math:`(1-\alpha)\,\mathrm{CE}(y, p_i) + \alpha\,\mathrm{KL}(p \| p_i) + \lambda\,\|F_i - F\|_2^2`,
    with both p of the KL at T. The network's p, and F, what goes into its head, get no gradient from that. An exit is
    a bottleneck, which brings a stage's map to the size and channels of the last one and averages it to :math:`F_i`,
    and a linear classifier. Exits are trained along, measured, and not exported: the student stays the plain network.

    There is no :math:`T^2`, as in the authors' code: :func:`tutelage.losses.kd` has it, so the term ``kd`` weighs
    :math:`\alpha / T^2`. And :func:`tutelage.losses.hint` is a mean over the D elements, so ``hint`` weighs
    :math:`\lambda D`. Images without a label teach the exits alone.

    Args:
        exits: taps of the student, shallow to deep; or ``auto``: the last map of each resolution but the deepest.
        alpha: share of the network's own word in the soft and hard labels of an exit, in [0, 1].
        temperature: T, above 0.
        hint: lambda, of the squared distance to the input of the head.
        factor: by how much a bottleneck is narrower than that input.

    Raises:
        ConfigError: a value out of range.

    Reference: Zhang et al., Be Your Own Teacher (ICCV 2019), section 3. Defaults are those of the authors' later code
    for CIFAR-100 (alpha 0.3, T 3, lambda 0.03). In it lambda belongs to the distance, not to its square as in the
    paper and here; features go through one more linear layer, and the shallowest exit has none of it.
    """

    needs = None

    def __init__(
        self,
        exits: Literal["auto"] | Sequence[str] | None = "auto",
        *,
        alpha: float = 0.3,
        temperature: float = 3.0,
        hint: float = 0.03,
        factor: int = 4,
    ) -> None:
        super().__init__()
        given = None if exits is None or exits == "auto" else list(exits)
        for name, value, right, remedy in (
            ("exits", exits, given is None or len(given) > 0, "auto, or a list of taps such as [stages.0]"),
            ("alpha", alpha, 0.0 <= alpha <= 1.0, "must lie in [0, 1]"),
            ("temperature", temperature, temperature > 0, "must be above 0"),
            ("hint", hint, hint >= 0, "must be 0 or more"),
            ("factor", factor, factor >= 1, "must be 1 or more"),
        ):
            if not right:
                raise ConfigError(f"{name}={value!r}", remedy=remedy)
        self.given, self.alpha, self.temperature, self.hint, self.factor = given, alpha, temperature, hint, factor
        self.taps: list[str] = []
        self.deepest = ""
        self.exits = nn.ModuleList()
        self.weights = {"ce": 1.0}

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Find the exits and make what is learned for them.

        Raises:
            ModelError: an unknown tap, a student without stages, or one that does not classify whole samples.
        """
        self.taps, self.deepest = self._found(student, example), find_embedding_tap(student)
        with eval_no_grad(student):
            inputs = example.to(device_of(student)).inputs
            seen = observe(student, inputs, Needs(hidden=(*self.taps, self.deepest)))
        feature, classes = seen.hidden[self.deepest], output_head(student).out_features
        if feature.ndim != 2:
            raise ModelError(
                f"what goes into the student's head is {tuple(feature.shape)}, not one vector a sample",
                remedy="byot is for classifiers of whole samples",
            )
        last = list(find_stages(student, example))
        size = last[-1] if last else (1, 1)
        signed = bool((feature < 0).any())
        made = []
        for tap in self.taps:
            shape = tuple(seen.hidden[tap].shape)
            if len(shape) not in (2, 4):
                raise ModelError(
                    f"{tap!r} gives {shape}: an exit is at a map [B, C, H, W] or a vector [B, D]",
                    where="method.exits", remedy="`tutelage taps` shows what there is",
                )  # fmt: skip
            made.append(Exit(shape, size, feature.shape[1], classes, factor=self.factor, signed=signed))
        self.exits = nn.ModuleList(made)
        self.student_needs = Needs(hidden=(*self.taps, self.deepest))
        soft, hint = self.alpha / self.temperature**2, self.hint * feature.shape[1]
        self.weights = {"ce": 1.0}
        for tap in self.taps:
            self.weights |= {f"ce({tap})": 1.0 - self.alpha, f"kd({tap})": soft, f"hint({tap})": hint}

    def _found(self, student: nn.Module, example: Batch) -> list[str]:
        """The taps of the exits."""
        if self.given is not None:
            for tap in self.given:
                try:
                    find_module(student, tap)
                except ModelError as error:
                    raise ModelError(error.what, where="method.exits", remedy=error.remedy) from None
            return self.given
        paths = list(find_stages(student, example).values())[:-1]
        if not paths:
            raise ModelError(
                f"{type(student).__name__} has no two resolutions of feature maps, at the earlier of which an exit "
                "could be",
                where="method.exits",
                remedy="use a student with stages, or name the modules: exits: [TAP, ...]",
            )
        return paths

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Of ``ce``: samples with a label; of ``kd`` and ``hint``: those that count."""
        labelled, counted = batch.labelled().sum(), batch.counted().sum()
        return {name: labelled if name.startswith("ce") else counted for name in self.weights}

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """``ce`` of the network, and ``ce``, ``kd`` and ``hint`` of each exit by its tap."""
        assert student.logits is not None
        word, feature = student.logits.detach(), student.hidden[self.deepest].detach()
        sums = {"ce": losses.cross_entropy(student.logits, batch.labels, mask=batch.mask, reduction="sum")}
        for tap, leave in zip(self.taps, self.exits, strict=True):
            mine, logits = leave(student.hidden[tap])
            sums[f"ce({tap})"] = losses.cross_entropy(logits, batch.labels, mask=batch.mask, reduction="sum")
            sums[f"kd({tap})"] = losses.kd(
                logits, word, temperature=self.temperature, mask=batch.mask, reduction="sum"
            )
            sums[f"hint({tap})"] = losses.hint(mine, feature, mask=batch.mask, reduction="sum")
        counts = self.counts(batch)
        return {name: Term(total, counts[name]) for name, total in sums.items()}

    def auxiliary_models(self, student: nn.Module) -> dict[str, nn.Module]:
        """The student as it answers at each exit, from shallow to deep."""
        pairs = zip(self.taps, self.exits, strict=True)
        return {f"exit-{i}": Early(student, tap, leave) for i, (tap, leave) in enumerate(pairs, 1)}

    def formula(self) -> str:
        """The loss in one line."""
        soft, hint = f"{self.alpha / self.temperature**2:.3g} * kd(T={self.temperature:g})", f"{self.hint:g}"
        where = ", ".join(self.taps or self.given or ["auto"])
        if self.taps:
            hint = f"{self.weights[f'hint({self.taps[0]})']:.3g}"
        return f"1 * ce + at {where}: {1 - self.alpha:g} * ce + {soft} + {hint} * hint"


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


class Early(nn.Module):
    """A network that answers at an exit."""

    def __init__(self, student: nn.Module, tap: str, leave: nn.Module) -> None:
        super().__init__()
        self.student, self.tap, self.leave = student, tap, leave

    def forward(self, inputs: Tensor | None = None, **named: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        seen = observe(self.student, named if inputs is None else inputs, Needs(logits=False, hidden=(self.tap,)))
        logits: Tensor = self.leave(seen.hidden[self.tap])[1]
        return logits
