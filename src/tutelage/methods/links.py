"""From a student's features to its teacher's: what is learned for that, and what compares them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage import objectives
from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError, ConfigError, ModelError
from tutelage.methods.base import Method, Phase, Term
from tutelage.students import Projector, build_projector, fitting, last_norm, resize
from tutelage.students.projectors import Shape
from tutelage.taps import Needs, Observation
from tutelage.teachers.signal import Signal

Where = Literal["activations", "embedding", "last", "named", "stages"]


class Site(NamedTuple):
    """A pair of taps, found in both models."""

    student: str
    teacher: str
    student_shape: Shape
    teacher_shape: Shape
    tokens: bool
    """Whether there is one feature for each position of a text, some of which may not count."""


class Setting(NamedTuple):
    """What a link is fitted to."""

    student: nn.Module
    teacher: nn.Module
    example: Batch
    ids: Tensor | None


class Link(nn.Module):
    """One term of a loss on features: one pair, or several that are learned together.

    Args:
        sites: the pairs.
        setting: the models.
        options: of the objective.

    Raises:
        ModelError: features that do not go together.
    """

    relation: ClassVar[bool] = False
    """Whether the rows of a batch are compared with each other."""
    maps: ClassVar[bool] = True
    """Whether it is for feature maps only."""
    needs_ids: ClassVar[bool] = False
    """Whether it needs the sample ids of the training data."""

    def __init__(self, sites: Sequence[Site], setting: Setting, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.sites, self.options = list(sites), dict(options)
        for site in sites:
            if self.maps and not len(site.student_shape) == len(site.teacher_shape) == 4:
                raise ModelError(
                    f"this objective compares feature maps, and these are {list(site.student_shape)} and "
                    f"{list(site.teacher_shape)}",
                    remedy="tap modules that give [B, C, H, W], or use hint or a relation",
                )

    def counted(self, batch: Batch) -> Tensor:
        """What the term averages over: tokens ``[B, L]``, or examples ``[B]``, as booleans."""
        if self.sites[0].tokens:
            positions = token_positions(batch)
            return positions.any(-1) if self.relation else positions
        return _rows(batch)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum of the objective over what counts; one feature of each for every pair."""
        raise NotImplementedError

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` or ``TypeError`` for an option's value that the objective does not take."""

    def phases(self) -> Sequence[Phase]:
        """What has to be trained first."""
        return ()

    def after_step(self) -> None:
        """Called after each optimizer step."""


def token_positions(batch: Batch) -> Tensor:
    """Positions that count: of texts with one label each, those that are no padding."""
    counted = batch.counted()
    attention = batch.inputs.get("attention_mask") if isinstance(batch.inputs, dict) else None
    if counted.ndim == 1 and attention is not None and attention.ndim == 2:
        return attention.bool() & counted.unsqueeze(-1)
    return counted


# Functions of a pair --------------------------------------------------------------------------------


class Compared(Link):
    """One pair and a function of tensors, with a projector where shapes must agree."""

    maps = False
    loss: Callable[..., Tensor]
    projects: ClassVar[bool] = False

    def __init__(self, sites: Sequence[Site], setting: Setting, options: Mapping[str, Any]) -> None:
        kept = {k: v for k, v in options.items() if k not in ("projector", "norm")}
        super().__init__(sites, setting, kept)
        (site,) = sites
        self.projector: nn.Module | None = None
        if self.projects:
            self.projector = build_projector(
                site.student_shape, site.teacher_shape,
                kind=options.get("projector", "auto"), norm=options.get("norm", False),
            )  # fmt: skip

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Try the options on features of ones."""
        probe = torch.ones(2, 2, 2, 2)
        cls.loss(probe, probe, **options)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum of the objective over what counts."""
        s, t = student[0], teacher[0]
        if self.projector is not None:
            s = self.projector(s, t)
        if self.sites[0].tokens and self.relation:
            positions = token_positions(batch)
            s, t = _mean(s, positions), _mean(t, positions)
        return type(self).loss(s, t, mask=self.counted(batch), reduction="sum", **self.options)


def _mean(x: Tensor, positions: Tensor) -> Tensor:
    """``[B, D]`` mean over the positions that count."""
    kept = x.float().masked_fill(~positions.unsqueeze(-1), 0.0)
    return kept.sum(1) / positions.sum(1, keepdim=True).clamp(min=1)


class Hint(Compared):
    """FitNets' regressor, and the mean square."""

    loss = staticmethod(objectives.hint)
    projects = True


class AttentionTransfer(Compared):
    """Maps of activation."""

    loss = staticmethod(objectives.attention_transfer)
    maps = True


class SelectivityTransfer(Compared):
    """Sets of channels."""

    loss = staticmethod(objectives.nst)
    maps = True


class Correlation(Compared):
    """Kernels between examples."""

    loss = staticmethod(objectives.correlation)
    relation = True


class ProbabilisticTransfer(Compared):
    """Distributions over neighbours."""

    loss = staticmethod(objectives.pkt)
    relation = True


class Angles(Compared):
    """Angles of triples of examples."""

    loss = staticmethod(objectives.rkd_angle)
    relation = True


class Distances(Compared):
    """Distances of pairs of examples."""

    loss = staticmethod(objectives.rkd_distance)
    relation = True


class Similarity(Compared):
    """Inner products of pairs of examples."""

    loss = staticmethod(objectives.similarity)
    relation = True


class TokenRelation(Compared):
    """Base of objectives whose examples are the query tokens of an attention."""

    heads_first: ClassVar[bool] = True
    remedy: ClassVar[str] = (
        "tap an attention module's probabilities, as in `attention.self[1]` of a model built with "
        "attn_implementation: eager"
    )

    def __init__(self, sites: Sequence[Site], setting: Setting, options: Mapping[str, Any]) -> None:
        super().__init__(sites, setting, options)
        s, t = sites[0].student_shape, sites[0].teacher_shape
        kind, wanted = ("attention [B, H, L, L]", 4) if self.heads_first else ("vectors [B, L, D]", 3)
        square = not self.heads_first or (s[-1:] == s[-2:-1] and t[-1:] == t[-2:-1])
        if not len(s) == len(t) == wanted or not square:
            raise ModelError(
                f"this objective compares {kind}, and these are {list(s)} and {list(t)}",
                remedy=self.remedy,
            )

    def counted(self, batch: Batch) -> Tensor:
        """Query tokens that count, ``[B, L]``."""
        length = self.sites[0].teacher_shape[-2]
        known = token_positions(batch)
        if known.ndim == 2:
            return known
        return known.unsqueeze(-1).expand(-1, length)  # of images, every patch


class AttentionSquares(TokenRelation):
    """Attention, compared by squares. TinyBERT's loss where the tap gives scores; on probabilities it is another."""

    loss = staticmethod(objectives.attention_mse)


class AttentionDivergence(TokenRelation):
    """Attention, compared as distributions. What a tap gives is taken for probabilities unless ``inputs: scores``."""

    loss = staticmethod(objectives.attention_kl)

    def __init__(self, sites: Sequence[Site], setting: Setting, options: Mapping[str, Any]) -> None:
        super().__init__(sites, setting, {"inputs": "probabilities", **options})


class ValueRelation(TokenRelation):
    """Relations between values."""

    loss = staticmethod(objectives.value_relation)
    heads_first = False
    remedy = "tap the layer that makes values (or queries, or keys)"

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Try the options on tokens of ones, as wide as there are heads."""
        heads = options.get("heads", 1)
        probe = torch.ones(1, 2, heads if isinstance(heads, int) and heads > 0 else 1)
        cls.loss(probe, probe, **{"heads": heads, **options})


# Links that learn more than a projector ---------------------------------------------------------------


def _convolutions(inputs: int, outputs: int, maps: bool) -> nn.Module:
    """Three pointwise layers with ReLU between them."""

    def layer(i: int, o: int) -> nn.Module:
        return nn.Conv2d(i, o, 1) if maps else nn.Linear(i, o)

    return nn.Sequential(
        layer(inputs, outputs), nn.ReLU(), layer(outputs, outputs), nn.ReLU(), layer(outputs, outputs)
    )


class Variational(Link):
    """VID: a network that predicts the teacher's feature, and a variance for each of its channels.

    Reference: Ahn et al., Variational Information Distillation for Knowledge Transfer (CVPR 2019); three 1x1
    convolutions and a first variance of 5, as in the CRD benchmark's code.
    """

    maps = False
    epsilon = 1e-5
    variance = 5.0

    def __init__(self, sites: Sequence[Site], setting: Setting, options: Mapping[str, Any]) -> None:
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
        objectives.vid(probe, probe, torch.ones(2), **options)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum of the negative log-likelihood over what counts."""
        s, t, mask = self.mean(student[0], teacher[0]), teacher[0], self.counted(batch)
        if s.ndim == 3:  # tokens: each is an example of one vector
            s, t, mask = s.flatten(0, 1), t.flatten(0, 1), mask.flatten()
        return objectives.vid(
            s, t, self.spread, epsilon=self.epsilon, mask=mask, reduction="sum", **self.options
        )  # fmt: skip

    def counted(self, batch: Batch) -> Tensor:
        """Examples, or tokens, that count."""
        counted = super().counted(batch)
        shape = self.sites[0].teacher_shape
        return counted.unsqueeze(-1).expand(-1, shape[1]) if len(shape) == 3 and counted.ndim == 1 else counted


class Overhaul(Link):
    """Overhaul: features before ReLU, through a 1x1 convolution and batch norm, against a margin ReLU.

    The margins come from the batch norm that makes the teacher's feature, or where a shortcut is added after it, from
    the last one before it. Earlier pairs weigh half of the next: give them in order.

    Reference: Heo et al., A Comprehensive Overhaul of Feature Distillation (ICCV 2019).
    """

    margins: list[Tensor]

    def __init__(self, sites: Sequence[Site], setting: Setting, options: Mapping[str, Any]) -> None:
        super().__init__(sites, setting, options)
        self.connectors = nn.ModuleList(
            build_projector(s.student_shape, s.teacher_shape, kind="conv1x1", norm=True) for s in sites
        )
        for i, site in enumerate(sites):
            norm = last_norm(setting.teacher, setting.example.for_teacher(), site.teacher)
            if norm is None or norm.weight is None:
                raise ModelError(
                    f"no batch norm gives what the teacher has at {site.teacher!r}, to take the margins from",
                    remedy="overhaul is for teachers with batch norm: use hint or vid",
                )
            self.register_buffer(f"margin{i}", objectives.overhaul_margin(norm.weight, norm.bias))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum of the partial squares over what counts."""
        total = student[0].new_zeros((), dtype=torch.float32)
        mask = self.counted(batch)
        for i, (connector, s, t) in enumerate(zip(self.connectors, student, teacher, strict=True)):
            margin = self.get_buffer(f"margin{i}")
            value = objectives.overhaul(connector(s, t), t, margin, mask=mask, reduction="sum")
            total = total + value / 2 ** (len(self.sites) - 1 - i)
        return total


class FactorTransfer(Link):
    """Factor transfer: a paraphraser of the teacher's feature, trained first, and a translator of the student's.

    Args:
        sites: one pair of maps, or of vectors.
        setting: the models.
        options: ``rate``, of the factor's channels to the teacher's, default 0.5; ``share`` of the steps for the
            paraphraser, default 0.1; ``variant`` of the objective.

    Reference: Kim, Park, Kwak, Paraphrasing Complex Network (NeurIPS 2018), section 3: three convolutions with
    leaky ReLU, and as many transposed ones to reconstruct.
    """

    maps = False

    def __init__(self, sites: Sequence[Site], setting: Setting, options: Mapping[str, Any]) -> None:
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
        objectives.factor_transfer(torch.ones(2, 2), torch.ones(2, 2), **given)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum over what counts of the distance between the factors."""
        factor = self.paraphraser.encoder(fitting(self.paraphraser, teacher[0]))
        mine = self.translator(fitting(self.translator, resize(student[0], teacher[0])))
        return objectives.factor_transfer(mine, factor, mask=self.counted(batch), reduction="sum", **self.options)

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
        return {"reconstruction": _rows(batch).sum()}

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """The mean square between the feature and its reconstruction."""
        assert signal is not None
        feature, rows = fitting(self.paraphraser, signal.hidden[self.tap]), _rows(batch)
        loss = objectives.hint(self.paraphraser(feature), feature, mask=rows, reduction="sum")
        return {"reconstruction": Term(loss, rows.sum())}


def _rows(batch: Batch) -> Tensor:
    counted = batch.counted()
    return counted if counted.ndim == 1 else counted.flatten(1).any(-1)


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
        x = self.narrow(fitting(self.narrow, feature))
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            share = self.attention(torch.cat([x, deeper], 1))
            x = x * share[:, :1] + deeper * share[:, 1:]
        y = x if x.shape[2:] == size else F.interpolate(x, size, mode="nearest")
        return self.widen(y), x


class Review(Link):
    """ReviewKD: the teacher's stages from the student's same and deeper stages, fused from the deepest on.

    Args:
        sites: pairs of maps, from the shallowest to the deepest.
        setting: the models.
        options: ``width`` of the fusion, default the student's deepest, at most 512; ``levels`` of the objective.

    Reference: Chen et al., Distilling Knowledge via Knowledge Review (CVPR 2021).
    """

    def __init__(self, sites: Sequence[Site], setting: Setting, options: Mapping[str, Any]) -> None:
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
            total = total + objectives.review(fused, teacher[i], mask=mask, reduction="sum", **self.options)
        return total


class Contrast(Link):
    """CRD: a head for each embedding, and the memory of every training example.

    Negatives are drawn from all other examples, whatever their class. (The authors' sampler leaves out those of the
    same class.)

    Args:
        sites: one pair of vectors; maps are averaged over positions.
        setting: the models, and the sample ids of the training data.
        options: ``width`` of the heads, default 128; ``negatives``, default 16384 or as many as there are others;
            ``momentum`` of the memory, default 0.5; ``temperature`` and ``variant`` of the objective, by default
            ``authors``, to which the weight belongs.

    Raises:
        CapabilityError: the sample ids are not known.

    Reference: Tian, Krishnan, Isola, Contrastive Representation Distillation (ICLR 2020).
    """

    maps = False
    needs_ids = True
    ids: Tensor

    def __init__(self, sites: Sequence[Site], setting: Setting, options: Mapping[str, Any]) -> None:
        options = {"variant": "authors", **options}
        width, negatives = options.pop("width", 128), options.pop("negatives", 16_384)
        momentum = options.pop("momentum", 0.5)
        super().__init__(sites, setting, options)
        if setting.ids is None:
            raise CapabilityError(
                "crd keeps a memory of every training example, and these have no ids",
                remedy="use a recipe, or a loader whose batches carry ids: distill(to_batch=...)",
            )
        (site,) = sites
        self.student_head, self.teacher_head = (
            nn.Linear(shape[1] if len(shape) == 4 else shape[-1], width)
            for shape in (site.student_shape, site.teacher_shape)
        )
        self.register_buffer("ids", setting.ids.sort().values)
        try:
            self.memory = objectives.ContrastiveMemory(len(setting.ids), width, momentum=momentum)
        except ValueError as error:
            raise ConfigError(f"crd: {error}", remedy="give more training examples, or other options") from None
        self.negatives = min(negatives, len(setting.ids) - 1)
        self.seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Whether the numbers are in range."""
        for key in ("width", "negatives"):
            number = options.get(key, 1)
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{key} must be a whole number above 0")
        objectives.ContrastiveMemory(2, 1, momentum=options.get("momentum", 0.5))
        if not options.get("temperature", 1.0) > 0:
            raise ValueError("temperature must be above 0")
        if options.get("variant", "paper") not in ("paper", "authors"):
            raise ValueError("variant must be paper or authors")

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum of the contrastive loss over what counts."""
        mask = self.counted(batch)
        s = self.student_head(fitting(self.student_head, self._vector(student[0], batch)))
        t = self.teacher_head(fitting(self.teacher_head, self._vector(teacher[0].detach(), batch)))
        index = self._index(batch) if self.training else torch.zeros(len(batch), dtype=torch.long, device=s.device)
        negatives = self.memory.draw(index, self.negatives)
        options = self.options
        if self.training:
            if options["variant"] == "authors":
                self.memory.calibrate(s, t, negatives, temperature=options.get("temperature", 0.07))
            self.seen.append((index, s.detach(), t.detach(), mask))
        elif not self.memory.scales.all():  # nothing is measured outside training
            options = {**options, "variant": "paper"}
        return objectives.crd(s, t, index, negatives, self.memory, mask=mask, reduction="sum", **options)

    def after_step(self) -> None:
        """Move the memory by what all processes have seen in this step."""
        seen, self.seen = self.seen, []
        if seen:
            self.memory.update(*_everywhere([torch.cat(parts) for parts in zip(*seen, strict=True)]))

    def _vector(self, x: Tensor, batch: Batch) -> Tensor:
        if x.ndim == 4:
            return x.mean((2, 3))
        return x if x.ndim == 2 else _mean(x, token_positions(batch)) if self.sites[0].tokens else x.mean(1)

    def _index(self, batch: Batch) -> Tensor:
        if batch.ids is None:
            raise CapabilityError("crd: a training batch has no ids", remedy="let every batch carry its samples' ids")
        index = torch.searchsorted(self.ids, batch.ids).clamp(max=len(self.ids) - 1)
        if not torch.equal(self.ids[index], batch.ids):
            raise CapabilityError(
                "crd: a training batch holds a sample that the memory does not know",
                remedy="train on the data that the method was built for",
            )
        return index

    def counted(self, batch: Batch) -> Tensor:
        """Examples that count."""
        return _rows(batch)


def _everywhere(parts: list[Tensor]) -> list[Tensor]:
    """The rows of all processes, in the order of their ranks; alone, the rows themselves."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return parts
    world = torch.distributed.get_world_size()
    if world == 1:
        return parts
    count = torch.tensor([len(parts[0])], device=parts[0].device)
    counts = [torch.zeros_like(count) for _ in range(world)]
    torch.distributed.all_gather(counts, count)
    most = int(torch.stack(counts).max())
    gathered = []
    for part in parts:
        padded = torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])])
        whole = [torch.zeros_like(padded) for _ in range(world)]
        torch.distributed.all_gather(whole, padded)
        gathered.append(torch.cat([rows[: int(n)] for rows, n in zip(whole, counts, strict=True)]))
    return gathered


# What a recipe can name -------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureObjective:
    """An objective on features, as a recipe names it.

    Attributes:
        link: what compares.
        options: what it takes.
        weight: where none is given: a number, or a function of the first pair and the options.
        where: what ``pairs: auto`` compares; ``named`` where pairs must be given.
        joint: whether all pairs make one link.
        source: where the weight comes from.
    """

    link: type[Link]
    options: tuple[str, ...] = ()
    weight: float | Callable[[Site, Mapping[str, Any]], float] = 1.0
    where: Where = "stages"
    joint: bool = False
    source: str = "ours"


def _by_elements(mean: float, variant: str, elements: Callable[[Site], int]) -> Callable[..., float]:
    """A weight published for a mean over elements, for a variant that sums them too."""

    def weight(site: Site, options: Mapping[str, Any]) -> float:
        return mean if options.get("variant") == variant else mean / elements(site)

    return weight


def _positions(site: Site) -> int:
    return math.prod(min(a, b) for a, b in zip(site.student_shape[2:], site.teacher_shape[2:], strict=True))


def _elements(site: Site) -> int:
    """Elements of an example; of tokens, each of which is one, of a token."""
    return site.teacher_shape[-1] if len(site.teacher_shape) == 3 else math.prod(site.teacher_shape[1:])


def _of_factor(site: Site, options: Mapping[str, Any]) -> float:
    """500 for a mean over the factor's elements."""
    channels = max(round(options.get("rate", 0.5) * site.teacher_shape[1]), 1)
    elements = channels * math.prod(site.teacher_shape[2:])
    return 500.0 if options.get("variant") == "authors" else 500.0 / elements


FEATURE_OBJECTIVES: dict[str, FeatureObjective] = {
    "attention_kl": FeatureObjective(AttentionDivergence, ("heads", "inputs", "temperature"), 1.0, "named"),
    "attention_mse": FeatureObjective(AttentionSquares, ("heads",), 1.0, "named"),
    "attention_transfer": FeatureObjective(
        AttentionTransfer, ("variant",), _by_elements(1000.0, "authors", _positions), source="Zagoruyko and Komodakis"
    ),
    "correlation": FeatureObjective(Correlation, ("gamma", "order"), 100.0, "embedding"),
    "crd": FeatureObjective(
        Contrast, ("negatives", "temperature", "variant", "width", "momentum"), 0.8, "embedding", source="Tian et al."
    ),
    "factor_transfer": FeatureObjective(
        FactorTransfer, ("rate", "share", "variant"), _of_factor, "last", source="Kim et al.",
    ),
    "hint": FeatureObjective(Hint, (), 100.0, source="Tian et al."),
    "nst": FeatureObjective(SelectivityTransfer, ("kernel",), 50.0, source="Tian et al., after Huang and Wang"),
    "overhaul": FeatureObjective(Overhaul, (), 1e-3, "activations", joint=True, source="Heo et al. on CIFAR"),
    "pkt": FeatureObjective(
        ProbabilisticTransfer, ("variant",),
        lambda site, options: 30000.0 if options.get("variant") == "authors" else 30000.0 / 64,
        "embedding", source="Tian et al., batch 64",
    ),
    "review": FeatureObjective(Review, ("levels", "width"), 1.0, joint=True, source="Chen et al., who use 0.6 to 8"),
    "rkd_angle": FeatureObjective(Angles, (), 50.0, "embedding", source="Tian et al., after Park et al."),
    "rkd_distance": FeatureObjective(Distances, (), 25.0, "embedding", source="Tian et al., after Park et al."),
    "similarity": FeatureObjective(Similarity, (), 3000.0, "last", source="Tung and Mori"),
    "value_relation": FeatureObjective(ValueRelation, ("heads", "temperature"), 1.0, "named"),
    "vid": FeatureObjective(Variational, ("variant",), _by_elements(1.0, "authors", _elements), source="Tian et al."),
}  # fmt: skip
"""Every objective that a pair can name. ``tutelage.config.FEATURE_OBJECTIVES`` has their options."""
