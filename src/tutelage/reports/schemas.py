"""What a page needs of the JSON files in a run directory. Keys that no page reads are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _SeedSpread(_Record):
    mean: float
    std: float | None = None
    values: list[float]


class _PairedDifference(_Record):
    """A difference over seeds, with its interval; one seed has no interval."""

    mean: float
    low: float | None = None
    high: float | None = None
    level: float
    n: int


class _StudentMetrics(_Record):
    """Test metrics of the students of an arm, at one choice of weights."""

    accuracy: _SeedSpread
    loss: _SeedSpread | None = None
    agreement: _SeedSpread | None = None
    kl: _SeedSpread | None = None
    ece: _SeedSpread | None = None
    rmse: _SeedSpread | None = None
    mae: _SeedSpread | None = None
    r2: _SeedSpread | None = None
    spearman: _SeedSpread | None = None
    pearson: _SeedSpread | None = None
    span_f1: _SeedSpread | None = None
    span_precision: _SeedSpread | None = None
    span_recall: _SeedSpread | None = None


class _ReliabilityBins(_Record):
    count: list[float]
    confidence: list[float]
    accuracy: list[float]


class _ByWeights(_Record):
    """Metrics of the weights that were best on validation, and of those of the last epoch."""

    best: _StudentMetrics
    last: _StudentMetrics


class _JointModel(_ByWeights):
    """A model that was trained together with the student: a peer, or an exit of the student."""

    parameters: int


class _ArmResult(_ByWeights):
    reliability: _ReliabilityBins | None = None
    per_class: list[float] | None = None
    per_target: dict[str, list[float]] | None = None
    seconds: _SeedSpread | None = None
    others: dict[str, _JointModel] | None = None


class _ArmResults(_Record):
    baseline: _ArmResult | None = None
    distilled: _ArmResult


class _ModelMetrics(_Record):
    accuracy: float
    loss: float | None = None
    ece: float | None = None
    rmse: float | None = None
    mae: float | None = None
    r2: float | None = None
    spearman: float | None = None
    pearson: float | None = None
    span_f1: float | None = None
    span_precision: float | None = None
    span_recall: float | None = None
    per_target: dict[str, list[float]] | None = None


class _EnsembleMember(_Record):
    name: str
    weight: float
    parameters: int
    test: _ModelMetrics


class _EnsembleResult(_Record):
    members: list[_EnsembleMember]


class _TeacherResult(_ModelMetrics):
    n: int | None = None
    reliability: _ReliabilityBins | None = None
    per_class: list[float] | None = None
    validation: _ModelMetrics | None = None
    ensemble: _EnsembleResult | None = None


class _ParameterCounts(_Record):
    teacher: int | None = None
    student: int


class _Latency(_Record):
    p50_ms: float
    p95_ms: float | None = None


class RunSummary(_Record):
    """``summary.json`` of a run."""

    name: str
    metric: str = "accuracy"
    formula: str | None = None
    uses_teacher: bool = True
    classes: list[str] | None = None
    seeds: list[int]
    repeated_seeds: list[int] = []
    parameters: _ParameterCounts
    capacity_ratio: float | None = None
    latency: dict[str, _Latency] | None = None
    teacher: _TeacherResult | None = None
    remote_teacher: dict[str, Any] | None = None
    """A teacher behind a server, which is not measured."""
    students: _ArmResults
    gain: dict[str, _PairedDifference] | None = None
    tasks: dict[str, dict[str, dict[str, float]]] | None = None
    """By model and task of lm-evaluation-harness: metrics by name."""
    device: str | None = None
    processes: int | None = None
    exported: str | None = None

    @model_validator(mode="after")
    def _check_teacher(self) -> RunSummary:
        size = self.parameters.teacher  # 0 for a teacher that is a function, or trees
        if self.teacher is not None and (size is None or (size and self.capacity_ratio is None)):
            raise ValueError("there is a teacher, but 'parameters.teacher' or 'capacity_ratio' is missing")
        if self.teacher is None and self.remote_teacher is None and self.uses_teacher:
            raise ValueError("'teacher' is missing")
        return self


class _StageDifference(_Record):
    best: _PairedDifference
    last: _PairedDifference


class _StageResult(_ByWeights):
    """A row of the table of a multi-stage run."""

    name: str
    role: str
    parameters: int
    taught_by: str | None = None
    validation: _SeedSpread | None = None
    against: dict[str, _StageDifference]


class MultistageSummary(_Record):
    """``summary.json`` of a multi-stage run."""

    workflow: str
    name: str
    verdict: str
    seeds: list[int]
    rows: list[_StageResult]
    stages: list[str]
    exported: str


class _LossTerm(_Record):
    raw: float
    weighted: float


class MetricsLine(_Record):
    """A line of ``metrics.jsonl``."""

    training: str
    step: int
    epoch: float
    loss: float | None = None
    terms: dict[str, _LossTerm] | None = None
    validation: _ModelMetrics | None = None


class SimilarityFile(_Record):
    """``similarity/NAME.json``: by temperature, the upper triangle of ``E[p_i p_j]``, row by row."""

    classes: int = Field(ge=0)
    n: int
    sim: dict[str, list[float]]

    @model_validator(mode="after")
    def _check_shape(self) -> SimilarityFile:
        if any(len(upper) != self.classes * (self.classes + 1) // 2 for upper in self.sim.values()):
            raise ValueError(f"a triangle is not of {self.classes} classes")
        if not all(_is_temperature(t) for t in self.sim):
            raise ValueError("a temperature is not a number above zero")
        return self


def _is_temperature(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


class _SampleRow(_Record):
    row: int
    label: int | None = None
    image: str | None = Field(default=None, pattern=r"^data:image/png;base64,[A-Za-z0-9+/=]+$")
    text: str | None = None
    logits: dict[str, list[float]]


class SamplesFile(_Record):
    """``samples/test.json``."""

    exported: str
    n: int
    reference: str
    student: str
    agree: dict[str, int]
    right: dict[Literal["both", "reference", "student", "neither"], int]
    by_class: dict[str, list[int]]
    pairs: list[Annotated[list[int], Field(min_length=3, max_length=3)]]
    samples: list[_SampleRow]

    @model_validator(mode="after")
    def _check_classes(self) -> SamplesFile:
        classes = len(self.by_class.get("n", []))
        if any(len(row) != classes for sample in self.samples for row in sample.logits.values()):
            raise ValueError(f"the logits are not all of {classes} classes")
        if any({self.reference, self.student} - sample.logits.keys() for sample in self.samples):
            raise ValueError(f"a sample lacks the logits of {self.reference} or {self.student}")
        if any(len(counts) != classes for counts in self.by_class.values()):
            raise ValueError(f"a count is not of {classes} classes")
        labels = [sample.label for sample in self.samples if sample.label is not None]
        if not all(0 <= i < classes for i in [*labels, *(i for pair in self.pairs for i in pair[:2])]):
            raise ValueError(f"a class is not among {classes}")
        return self


class GenerationsFile(_Record):
    """``samples/written.json``: continuations of test texts by each model."""

    exported: str
    tokens: int
    models: list[str]
    texts: list[dict[str, str]]

    @model_validator(mode="after")
    def _check_models(self) -> GenerationsFile:
        keys = {"prompt", "data", *self.models}
        if any(keys - text.keys() for text in self.texts):
            raise ValueError(f"a text lacks one of {', '.join(sorted(keys))}")
        return self


class _JudgedPair(_Record):
    """Two answers compared by the judge, over all prompts."""

    pair: Annotated[list[str], Field(min_length=2, max_length=2)]
    prompts: int
    judged: int
    wins: int
    ties: int
    losses: int
    rate: float | None = None
    low: float | None = None
    high: float | None = None
    opposed: int
    first_place: float | None = None
    without_verdict: int


class _JudgedPrompt(_Record):
    messages: list[dict[str, str]]
    answers: dict[str, str]
    verdicts: dict[str, list[Literal["win", "tie", "loss"] | None]]


class JudgementFile(_Record):
    """``judged.json``, and ``judged/NAME.json`` of a run."""

    name: str
    judge: str
    prompts: int
    roles: dict[str, Literal["teacher", "baseline", "distilled"]]
    held_out_loss: dict[str, float]
    pairs: list[_JudgedPair]
    samples: list[_JudgedPrompt]


class _SearchKey(_Record):
    key: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    values: list[Any] | None = None
    own: Any = None


class _SearchTrial(_Record):
    number: int
    state: str
    values: dict[str, Any]
    validation: float | None = None
    evaluations: list[float]
    seconds: float
    why: str | None = None


class _DefaultTrial(_Record):
    trial: int | None = None
    validation: float


class _SearchTest(_Record):
    """Test metrics, which a search reads once."""

    default: dict[str, _SeedSpread]
    chosen: dict[str, _SeedSpread]
    gain: dict[str, _PairedDifference]


class SearchFile(_Record):
    """``search.json``."""

    name: str
    objective: str
    seeds: list[int]
    settings: dict[str, Any]
    space: list[_SearchKey]
    trials: list[_SearchTrial]
    importance: dict[str, float]
    best: int
    default: _DefaultTrial
    same: bool
    gain_on_validation: _PairedDifference
    test: _SearchTest
    seconds: float

    @model_validator(mode="after")
    def _check_best(self) -> SearchFile:
        if not any(trial.number == self.best for trial in self.trials):
            raise ValueError(f"has no trial {self.best}, which it names as the best")
        return self
