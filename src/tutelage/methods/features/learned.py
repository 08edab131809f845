"""Losses on features that learn more than a projector: VID, overhaul, factor transfer, ReviewKD."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage import losses
from tutelage.config import ResolvedPair
from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.methods.base import Method, Phase, Term
from tutelage.methods.features.base import FeatureContext, FeatureLoss, FeaturePair, counted_rows
from tutelage.students import (
    Projector,
    build_projector,
    find_last_norm,
    match_dtype,
    resize_like,
    to_channels_first,
)
from tutelage.taps import Needs, Observation
from tutelage.teachers.signal import Signal


def _convolutions(inputs: int, outputs: int, maps: bool) -> nn.Module:
    """Three pointwise layers with ReLU between them."""

    def layer(i: int, o: int) -> nn.Module:
        return nn.Conv2d(i, o, 1) if maps else nn.Linear(i, o)

    return nn.Sequential(
        layer(inputs, outputs), nn.ReLU(), layer(outputs, outputs), nn.ReLU(), layer(outputs, outputs)
    )


class VidLoss(FeatureLoss):
    """VID: a network that predicts the teacher's feature, and a variance for each of its channels.

    Reference: Ahn et al., Variational Information Distillation for Knowledge Transfer (CVPR 2019); three 1x1
    convolutions and a first variance of 5, as in the CRD benchmark's code.
    """

    epsilon = 1e-5
    variance = 5.0

    def __init__(self, settings: ResolvedPair, pairs: Sequence[FeaturePair], context: FeatureContext) -> None:
        super().__init__(settings, pairs, context)
        (pair,) = pairs
        s, t = pair.student_shape, pair.teacher_shape
        build_projector(s, t)  # says what does not go together
        maps = len(s) == len(t) == 4
        inputs, outputs = s[1] if len(s) == 4 else s[-1], t[1] if maps else t[-1]
        self.mean = Projector(_convolutions(inputs, outputs, maps))
        self.spread = nn.Parameter(torch.full((outputs,), math.log(math.expm1(self.variance - self.epsilon))))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum of the negative log-likelihood over what counts."""
        s, t, mask = self.mean(student[0], teacher[0]), teacher[0], self.counted(batch)
        if s.ndim == 3:  # tokens: each is an example of one vector
            s, t, mask = s.flatten(0, 1), t.flatten(0, 1), mask.flatten()
        return losses.vid(s, t, self.spread, epsilon=self.epsilon, mask=mask, reduction="sum", **self.arguments)

    def counted(self, batch: Batch) -> Tensor:
        """Examples, or tokens, that count."""
        counted = super().counted(batch)
        shape = self.pairs[0].teacher_shape
        return counted.unsqueeze(-1).expand(-1, shape[1]) if len(shape) == 3 and counted.ndim == 1 else counted


class OverhaulLoss(FeatureLoss):
    """Overhaul: features before ReLU, through a 1x1 convolution and batch norm, against a margin ReLU.

    The margins come from the batch norm that makes the teacher's feature, or where a shortcut is added after it, from
    the last one before it. Earlier pairs weigh half of the next: give them in order.

    Reference: Heo et al., A Comprehensive Overhaul of Feature Distillation (ICCV 2019).
    """

    margins: list[Tensor]

    def __init__(self, settings: ResolvedPair, pairs: Sequence[FeaturePair], context: FeatureContext) -> None:
        super().__init__(settings, pairs, context)
        self.connectors = nn.ModuleList(
            build_projector(s.student_shape, s.teacher_shape, kind="conv1x1", norm=True) for s in pairs
        )
        for i, pair in enumerate(pairs):
            norm = find_last_norm(context.teacher, context.example.for_teacher(), pair.teacher)
            if norm is None or norm.weight is None:
                raise ModelError(
                    f"the teacher's {pair.teacher!r} is not the output of a batch norm, which sets the margins",
                    remedy="overhaul is for teachers with batch norm: use hint or vid",
                )
            self.register_buffer(f"margin{i}", losses.overhaul_margin(norm.weight, norm.bias))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum of the partial squares over what counts."""
        total = student[0].new_zeros((), dtype=torch.float32)
        mask = self.counted(batch)
        for i, (connector, s, t) in enumerate(zip(self.connectors, student, teacher, strict=True)):
            margin = self.get_buffer(f"margin{i}")
            value = losses.overhaul(connector(s, t), t, margin, mask=mask, reduction="sum")
            total = total + value / 2 ** (len(self.pairs) - 1 - i)
        return total


class FactorTransferLoss(FeatureLoss):
    """Factor transfer: a paraphraser of the teacher's feature, trained first, and a translator of the student's.

    Reference: Kim, Park, Kwak, Paraphrasing Complex Network (NeurIPS 2018), section 3: three convolutions with
    leaky ReLU, and as many transposed ones to reconstruct.
    """

    def __init__(self, settings: ResolvedPair, pairs: Sequence[FeaturePair], context: FeatureContext) -> None:
        super().__init__(settings, pairs, context)
        (pair,) = pairs
        s, t = pair.student_shape, pair.teacher_shape
        if len(s) != len(t) or len(s) not in (2, 4):
            raise ModelError(
                f"factor_transfer takes two maps or two vectors, and these are {list(s)} and {list(t)}",
                remedy="tap modules that give [B, C, H, W] in both models",
            )
        maps, factor = len(s) == 4, max(round(self.options.rate * t[1]), 1)
        self.paraphraser = Paraphraser(t[1], factor, maps).requires_grad_(False)
        self.translator = _factors(s[1], s[1], factor, maps)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum over what counts of the distance between the factors."""
        factor = self.paraphraser.encoder(match_dtype(self.paraphraser, teacher[0]))
        mine = self.translator(match_dtype(self.translator, resize_like(student[0], teacher[0])))
        return losses.factor_transfer(mine, factor, mask=self.counted(batch), reduction="sum", **self.arguments)

    def phases(self) -> Sequence[Phase]:
        """The paraphraser."""
        return [Phase("paraphraser", self.options.share, Paraphrasing(self))]


def _factors(inputs: int, middle: int, outputs: int, maps: bool, transposed: bool = False) -> nn.Sequential:
    """Three 3x3 convolutions (on vectors: linear layers) with leaky ReLU."""

    def layer(i: int, o: int) -> nn.Module:
        if not maps:
            return nn.Linear(i, o)
        return (nn.ConvTranspose2d if transposed else nn.Conv2d)(i, o, 3, padding=1)

    widths = [(inputs, middle), (middle, outputs), (outputs, outputs)]
    return nn.Sequential(*(part for i, o in widths for part in (layer(i, o), nn.LeakyReLU(0.1))))


class Paraphraser(nn.Module):
    """An autoencoder of the teacher's feature."""

    def __init__(self, channels: int, factor: int, maps: bool) -> None:
        super().__init__()
        self.encoder = _factors(channels, channels, factor, maps)
        self.decoder = _factors(factor, factor, channels, maps, transposed=True)

    def forward(self, feature: Tensor) -> Tensor:
        """The feature, reconstructed."""
        out: Tensor = self.decoder(self.encoder(feature))
        return out


class Paraphrasing(Method):
    """Trains a paraphraser to reconstruct the teacher's feature; the student is not run."""

    student_needs = None

    def __init__(self, loss: FactorTransferLoss) -> None:
        super().__init__()
        self.paraphraser, self.tap = loss.paraphraser, loss.pairs[0].teacher
        self.channels_last = loss.pairs[0].channels_last[1]
        self.needs = Needs(logits=False, hidden=(self.tap,))
        self.weights = {"reconstruction": 1.0}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Rows that count."""
        return {"reconstruction": counted_rows(batch).sum()}

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """The mean square between the feature and its reconstruction."""
        feature = to_channels_first(signal.hidden[self.tap], self.channels_last)
        feature, rows = match_dtype(self.paraphraser, feature), counted_rows(batch)
        loss = losses.hint(self.paraphraser(feature), feature, mask=rows, reduction="sum")
        return {"reconstruction": Term(loss, rows.sum())}


class Fusion(nn.Module):
    """ReviewKD's attention-based fusion of one stage with what comes from the deeper ones.

    Reference: Chen et al., Distilling Knowledge via Knowledge Review (CVPR 2021), figure 3.
    """

    def __init__(self, inputs: int, middle: int, outputs: int, *, fuse: bool) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.attention = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuse else None
        self.widen = nn.Sequential(nn.Conv2d(middle, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, feature: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """The feature in the teacher's shape, and what goes on to the next shallower stage."""
        x = self.narrow(match_dtype(self.narrow, feature))
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            share = self.attention(torch.cat([x, deeper], 1))
            x = x * share[:, :1] + deeper * share[:, 1:]
        y = x if x.shape[2:] == size else F.interpolate(x, size, mode="nearest")
        return self.widen(y), x


class ReviewLoss(FeatureLoss):
    """ReviewKD: the teacher's stages from the student's same and deeper stages, fused from the deepest on.

    The pairs are in order from the shallowest to the deepest.

    Reference: Chen et al., Distilling Knowledge via Knowledge Review (CVPR 2021).
    """

    def __init__(self, settings: ResolvedPair, pairs: Sequence[FeaturePair], context: FeatureContext) -> None:
        super().__init__(settings, pairs, context)
        middle = self.options.width or min(512, pairs[-1].student_shape[1])
        self.fusions = nn.ModuleList(
            Fusion(pair.student_shape[1], middle, pair.teacher_shape[1], fuse=i < len(pairs) - 1)
            for i, pair in enumerate(pairs)
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum over stages and over what counts of the hierarchical context loss."""
        total = student[0].new_zeros((), dtype=torch.float32)
        deeper: Tensor | None = None
        mask = self.counted(batch)
        for i in reversed(range(len(self.pairs))):
            fused, deeper = self.fusions[i](student[i], deeper, teacher[i].shape[2:])
            total = total + losses.review(fused, teacher[i], mask=mask, reduction="sum", **self.arguments)
        return total
