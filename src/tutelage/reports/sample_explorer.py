"""Single test samples: where teacher and student disagree, and how the temperature changes their distributions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tutelage.reports.formatting import count, percent
from tutelage.reports.plotting import ROLES
from tutelage.reports.results import model_names
from tutelage.reports.run_files import RunRecord


def recipe_temperature(run: RunRecord) -> float:
    """The temperature of the recipe; 4 where it has none."""
    try:
        temperature = float((run.settings or {})["method"]["temperature"])
    except (LookupError, TypeError, ValueError):
        return 4.0
    return temperature if 0 < temperature < math.inf else 4.0


def class_names(run: RunRecord, classes: int) -> list[str]:
    """A name for each class; ``class 3`` where the run has none."""
    known = run.summary.get("classes") or []
    return [known[i] if i < len(known) else f"class {i}" for i in range(classes)]


def explorer_of(run: RunRecord) -> dict[str, Any]:
    """The form of a run that stored samples: samples to choose, the recipe's T, and the data for ``explorer.js``."""
    stored = run.samples
    assert stored is not None
    names, labels = class_names(run, len(stored["by_class"]["n"])), model_names(run.summary)
    models = [role for role in ROLES if role in stored["samples"][0]["logits"]]
    data = {
        "names": names, "models": models, "labels": [labels[role] for role in models],
        "reference": stored["reference"], "student": stored["student"],
        "samples": [
            {"label": sample["label"], "logits": [sample["logits"][role] for role in models]}
            for sample in stored["samples"]
        ],
    }  # fmt: skip
    cards = [_card(sample, (stored["reference"], stored["student"]), names) for sample in stored["samples"]]
    return {"cards": cards, "temperature": recipe_temperature(run), "data": data}


def _card(sample: Mapping[str, Any], models: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """A sample to choose, with the top class of each model; ``is_right`` is ``None`` without a label."""
    tops = {role: _top_class(sample["logits"][role]) for role in models}
    label = sample["label"]
    return {
        "row": sample["row"], "image": sample["image"], "text": sample["text"] or "",
        "label": "no label" if label is None else names[label],
        "do_agree": len({k for k, _ in tops.values()}) == 1,
        "predictions": [
            {"role": role, "label": names[k], "probability": percent(p),
             "is_right": None if label is None else k == label}
            for role, (k, p) in tops.items()
        ],
    }  # fmt: skip


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
