"""Links that learn more than a projector: VID, overhaul, factor transfer, ReviewKD."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage import losses
from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.methods.base import Method, Phase, Term
from tutelage.methods.features.base import FeatureContext, FeatureLoss, FeaturePair, counted_rows
from tutelage.students import Projector, build_projector, find_last_norm, match_dtype, resize_like
from tutelage.taps import Needs, Observation
from tutelage.teachers.signal import Signal


def _convolutions(inputs: int, outputs: int, maps: bool) -> nn.Module:
    """Three pointwise layers with ReLU between them."""

    def layer(i: int, o: int) -> nn.Module:
        return nn.Conv2d(i, o, 1) if maps else nn.Linear(i, o)

    return nn.Sequential(
        layer(inputs, outputs), nn.ReLU(), layer(outputs, outputs), nn.ReLU(), layer(outputs, outputs)
    )


class Variational(FeatureLoss):
    """VID: a network that predicts the teacher's feature, and a variance for each of its channels.

    Reference: Ahn et al., Variational Information Distillation for Knowledge Transfer (CVPR 2019); three 1x1
    convolutions and a first variance of 5, as in the CRD benchmark's code.
    """

    maps = False
    epsilon = 1e-5
    variance = 5.0

    def __init__(self, sites: Sequence[FeaturePair], setting: FeatureContext, options: Mapping[str, Any]) -> None:
        super().__init__(sites, setting, options)
        (site,) = sites
        s, t = site.student_shape, site.teacher_shape
        build_projector(s, t)  # says what does not go together
        maps = len(s) == len(t) == 4
        inputs, outputs = s[1] if len(s) == 4 else s[-1], t[1] if maps else t[-1]
        self.mean = Projector(_convolutions(inputs, outputs, maps))
        self.spread = nn.Parameter(torch.full((outputs,), math.log(math.expm1(self.variance - self.epsilon))))

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Try the options on features of ones."""
        probe = torch.ones(2, 2)
        losses.vid(probe, probe, torch.ones(2), **options)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum of the negative log-likelihood over what counts."""
        s, t, mask = self.mean(student[0], teacher[0]), teacher[0], self.counted(batch)
        if s.ndim == 3:  # tokens: each is an example of one vector
            s, t, mask = s.flatten(0, 1), t.flatten(0, 1), mask.flatten()
        return losses.vid(
            s, t, self.spread, epsilon=self.epsilon, mask=mask, reduction="sum", **self.options
        )  # fmt: skip

    def counted(self, batch: Batch) -> Tensor:
        """Examples, or tokens, that count."""
        counted = super().counted(batch)
        shape = self.sites[0].teacher_shape
        return counted.unsqueeze(-1).expand(-1, shape[1]) if len(shape) == 3 and counted.ndim == 1 else counted


class Overhaul(FeatureLoss):
    """Overhaul: features before ReLU, through a 1x1 convolution and batch norm, against a margin ReLU.

    The margins come from the batch norm that makes the teacher's feature, or where a shortcut is added after it, from
    the last one before it. Earlier pairs weigh half of the next: give them in order.

    Reference: Heo et al., A Comprehensive Overhaul of Feature Distillation (ICCV 2019).
    """

    margins: list[Tensor]

    def __init__(self, sites: Sequence[FeaturePair], setting: FeatureContext, options: Mapping[str, Any]) -> None:
        super().__init__(sites, setting, options)
        self.connectors = nn.ModuleList(
            build_projector(s.student_shape, s.teacher_shape, kind="conv1x1", norm=True) for s in sites
        )
        for i, site in enumerate(sites):
            norm = find_last_norm(setting.teacher, setting.example.for_teacher(), site.teacher)
            if norm is None or norm.weight is None:
                raise ModelError(
                    f"no batch norm gives what the teacher has at {site.teacher!r}, to take the margins from",
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
            total = total + value / 2 ** (len(self.sites) - 1 - i)
        return total


class FactorTransfer(FeatureLoss):
    """Factor transfer: a paraphraser of the teacher's feature, trained first, and a translator of the student's.

    Args:
        sites: one pair of maps, or of vectors.
        setting: the models.
        options: ``rate``, of the factor's channels to the teacher's, default 0.5; ``share`` of the steps for the
            paraphraser, default 0.1; ``variant`` of the loss.

    Reference: Kim, Park, Kwak, Paraphrasing Complex Network (NeurIPS 2018), section 3: three convolutions with
    leaky ReLU, and as many transposed ones to reconstruct.
    """

    maps = False

    def __init__(self, sites: Sequence[FeaturePair], setting: FeatureContext, options: Mapping[str, Any]) -> None:
        options = dict(options)
        rate, self.share = options.pop("rate", 0.5), options.pop("share", 0.1)
        super().__init__(sites, setting, options)
        (site,) = sites
        s, t = site.student_shape, site.teacher_shape
        if len(s) != len(t) or len(s) not in (2, 4):
            raise ModelError(
                f"factor_transfer takes two maps or two vectors, and these are {list(s)} and {list(t)}",
                remedy="tap modules that give [B, C, H, W] in both models",
            )
        maps, factor = len(s) == 4, max(round(rate * t[1]), 1)
        self.paraphraser = Paraphraser(t[1], factor, maps).requires_grad_(False)
        self.translator = _factors(s[1], s[1], factor, maps)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Try the options on factors of ones."""
        given = dict(options)
        rate, share = given.pop("rate", 0.5), given.pop("share", 0.1)
        if not rate > 0 or not 0 < share < 1:
            raise ValueError("rate must be above 0, and share between 0 and 1")
        losses.factor_transfer(torch.ones(2, 2), torch.ones(2, 2), **given)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum over what counts of the distance between the factors."""
        factor = self.paraphraser.encoder(match_dtype(self.paraphraser, teacher[0]))
        mine = self.translator(match_dtype(self.translator, resize_like(student[0], teacher[0])))
        return losses.factor_transfer(mine, factor, mask=self.counted(batch), reduction="sum", **self.options)

    def phases(self) -> Sequence[Phase]:
        """The paraphraser."""
        return [Phase("paraphraser", self.share, Paraphrasing(self))]


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

    def __init__(self, link: FactorTransfer) -> None:
        super().__init__()
        self.paraphraser, self.tap = link.paraphraser, link.sites[0].teacher
        self.needs = Needs(logits=False, hidden=(self.tap,))
        self.weights = {"reconstruction": 1.0}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Rows that count."""
        return {"reconstruction": counted_rows(batch).sum()}

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """The mean square between the feature and its reconstruction."""
        assert signal is not None
        feature, rows = match_dtype(self.paraphraser, signal.hidden[self.tap]), counted_rows(batch)
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


class Review(FeatureLoss):
    """ReviewKD: the teacher's stages from the student's same and deeper stages, fused from the deepest on.

    Args:
        sites: pairs of maps, from the shallowest to the deepest.
        setting: the models.
        options: ``width`` of the fusion, default the student's deepest, at most 512; ``levels`` of the loss.

    Reference: Chen et al., Distilling Knowledge via Knowledge Review (CVPR 2021).
    """

    def __init__(self, sites: Sequence[FeaturePair], setting: FeatureContext, options: Mapping[str, Any]) -> None:
        options = dict(options)
        middle = options.pop("width", None) or min(512, sites[-1].student_shape[1])
        if "levels" in options:
            options["levels"] = tuple(options["levels"])
        super().__init__(sites, setting, options)
        self.fusions = nn.ModuleList(
            Fusion(site.student_shape[1], middle, site.teacher_shape[1], fuse=i < len(sites) - 1)
            for i, site in enumerate(sites)
        )

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Whether width and levels are whole numbers above 0."""
        for number in (options.get("width", 1), *options.get("levels", ())):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{number!r} is not a whole number above 0")

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum over stages and over what counts of the hierarchical context loss."""
        total = student[0].new_zeros((), dtype=torch.float32)
        deeper: Tensor | None = None
        mask = self.counted(batch)
        for i in reversed(range(len(self.sites))):
            fused, deeper = self.fusions[i](student[i], deeper, teacher[i].shape[2:])
            total = total + losses.review(fused, teacher[i], mask=mask, reduction="sum", **self.options)
        return total
