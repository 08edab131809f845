"""Single test samples: where teacher and student disagree, and how the temperature changes their distributions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from tutelage.reports.formatting import count, percent
from tutelage.reports.results import model_names
from tutelage.reports.run_files import RunRecord
from tutelage.reports.tables import Table

LOWEST, HIGHEST = 0.25, 20.0
"""Ends of the temperature slider, which is logarithmic."""
STEPS = 100


@dataclass(frozen=True)
class Prediction:
    """The top class of a model; ``is_right`` is ``None`` for a sample without a label."""

    role: str
    label: str
    probability: str
    is_right: bool | None


@dataclass(frozen=True)
class SampleCard:
    """A sample to choose."""

    row: int
    label: str
    predictions: list[Prediction]
    do_agree: bool
    image: str | None
    text: str


@dataclass(frozen=True)
class Explorer:
    """The form of a run.

    Attributes:
        cards: the samples.
        temperature: that of the recipe.
        position: of the slider at this temperature.
        first: the model whose order of classes is shown.
        data: for ``explorer.js``.
    """

    cards: list[SampleCard]
    temperature: float
    position: int
    first: str
    data: dict[str, Any]


def recipe_temperature(run: RunRecord) -> float:
    """The temperature of the recipe; 4 where it has none."""
    try:
        temperature = float(yaml.safe_load(run.config)["method"]["temperature"])
    except (yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError):
        return 4.0
    return temperature if 0 < temperature < math.inf else 4.0


def class_names(run: RunRecord, classes: int) -> list[str]:
    """A name for each class; ``class 3`` where the run has none."""
    known = run.summary.get("classes") or []
    return [known[i] if i < len(known) else f"class {i}" for i in range(classes)]


def explorer_of(run: RunRecord) -> Explorer | None:
    """The explorer of a run; ``None`` where the run stored no samples."""
    stored = run.samples
    if stored is None or not stored["samples"]:
        return None
    names, labels = class_names(run, len(stored["by_class"]["n"])), model_names(run.summary)
    models = [role for role in ("teacher", "baseline", "distilled") if role in stored["samples"][0]["logits"]]
    data = {
        "names": names, "models": models, "labels": [labels[role] for role in models],
        "reference": stored["reference"], "student": stored["student"],
        "samples": [
            {"label": sample["label"], "logits": [sample["logits"][role] for role in models]}
            for sample in stored["samples"]
        ],
    }  # fmt: skip
    temperature = recipe_temperature(run)
    clipped = min(max(temperature, LOWEST), HIGHEST)
    position = round(STEPS * math.log(clipped / LOWEST) / math.log(HIGHEST / LOWEST))
    cards = [_card(sample, (stored["reference"], stored["student"]), names) for sample in stored["samples"]]
    first = "teacher" if stored["reference"] == "teacher" else "first model"
    return Explorer(cards, temperature, position, first, data)


def _card(sample: Mapping[str, Any], models: Sequence[str], names: Sequence[str]) -> SampleCard:
    tops = {role: _top_class(sample["logits"][role]) for role in models}
    label = sample["label"]
    predictions = [
        Prediction(role, names[k], percent(p), None if label is None else k == label) for role, (k, p) in tops.items()
    ]
    name = "no label" if label is None else names[label]
    do_agree = len({k for k, _ in tops.values()}) == 1
    return SampleCard(sample["row"], name, predictions, do_agree, sample["image"], sample["text"] or "")


def _top_class(logits: Sequence[float]) -> tuple[int, float]:
    """The most probable class and its probability."""
    k = max(range(len(logits)), key=logits.__getitem__)
    return k, 1 / math.fsum(math.exp(z - logits[k]) for z in logits)


def disagreement_text(samples: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """How often reference and student disagree, and which of them is right then."""
    first, second = names[samples["reference"]], names[samples["student"]]
    n, right = samples["n"], samples["right"]
    apart = n - samples["agree"][samples["student"]]
    text = (
        f"The {first} and the {second} ({samples['exported']}) disagree on {count(apart)} of {count(n)} test samples"
    )
    text += f", {percent(apart / n)}." if n else "."
    if not apart:
        return text
    text += (
        f" Only the {first} is right on {count(right['reference'])}, only the {second} on {count(right['student'])}; "
        f"both are right on {count(right['both'])}, neither on {count(right['neither'])}."
    )
    baseline = samples["agree"].get("baseline")
    if baseline is not None and samples["reference"] == "teacher":
        text += f" The {names['baseline']} disagrees with the teacher on {count(n - baseline)}."
    return text


def confusion_table(run: RunRecord) -> Table | None:
    """The most frequent disagreements; ``None`` where there is none."""
    samples = run.samples
    if samples is None or not samples["samples"] or not samples["pairs"]:
        return None
    names, models = class_names(run, len(samples["by_class"]["n"])), model_names(run.summary)
    columns = [f"The {models[samples['reference']]}'s class", f"The {models[samples['student']]}'s class", "Samples"]
    rows = [[names[i], names[j], count(n)] for i, j, n in samples["pairs"][:8]]
    return Table("Most frequent disagreements", columns, rows, "narrow text-cells")
