"""The model card of an export: what it is, its origin, and the metrics of its run."""

import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

from tutelage.data.preprocessing import Preprocessing

SECTIONS = ("data", "teacher", "student", "method", "train")

PIPELINES = {
    "images": "image-classification", "classes": "text-classification", "multi-label": "text-classification",
    "regression": "text-classification", "tokens": "token-classification", "mlm": "fill-mask",
    "causal": "text-generation", "embedding": "sentence-similarity",
}  # fmt: skip
"""The pipeline tag of the Hugging Face hub for each task."""

PERCENTAGES = ("accuracy", "f1", "recall", "agreement")

LIBRARIES = {"hf": "transformers", "onnx": "onnx", "int8": "onnx", "torch-export": "pytorch"}


def model_card(manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """A model card in Markdown, with metadata for the Hugging Face hub.

    ``facts`` are ``summary`` and ``recipe`` of the run, if there is one, and ``auto``, transformers' auto class.
    """
    from jinja2 import Environment

    summary, recipe = facts.get("summary") or {}, facts.get("recipe") or {}
    name = str(summary.get("name") or recipe.get("name") or "model")
    metric = str(summary.get("metric", "accuracy"))
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"plain": _plain, "code": _code, "value": _value}
    template = environment.from_string((resources.files(__package__) / "card.md.jinja").read_text(encoding="utf-8"))
    preprocessing = manifest["preprocessing"]
    teacher_value, student_value = (summary.get("teacher") or {}).get(metric), _metric_of(summary, metric)
    retention = None
    if teacher_value and student_value is not None and metric != "perplexity":
        retention = student_value / teacher_value
    measured = manifest.get("measured") or {"source": {}, "export": {}}
    both = [measured[which].get(metric) for which in ("source", "export")]
    text = template.render(
        front=_metadata(manifest, summary, recipe, name).to_yaml(),
        name=name, manifest=manifest, summary=summary, metric=metric, check=manifest["check"],
        auto=facts.get("auto") or "AutoModel", recipe={section: _section(recipe, section) for section in SECTIONS},
        rows=list(_rows(summary, metric)),
        gain=_gain((summary.get("gain") or {}).get("best"), metric),
        retention=retention, quantised=None if None in both else both,
        prepared=Preprocessing.from_dict(preprocessing).describe() if "mean" in preprocessing else "not known",
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _metadata(manifest: Mapping[str, Any], summary: Mapping[str, Any], recipe: Mapping[str, Any], name: str) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    pipeline = PIPELINES.get(str(manifest["task"]), "other")
    kind, _, model = str(_section(recipe, "teacher").get("model") or "").partition(":")
    on_hub = kind == "hf" and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) and not model.startswith(".")
    data = _section(recipe, "data")
    metric = str(summary.get("metric", "accuracy"))
    value = _metric_of(summary, metric)
    known: dict[str, Any] = {}
    if data.get("source") in ("hf", "hub") and data.get("path"):
        known["datasets"] = [str(data["path"])]
    if value is not None:
        known |= {"metrics": [metric], "model_name": name, "eval_results": [
            EvalResult(
                task_type=pipeline, dataset_name=str(data.get("source", "the run's own data")),
                dataset_type=str(data.get("path") or data.get("source") or "private"), dataset_split="test",
                metric_type=metric, metric_value=round(value, 6),
            )
        ]}  # fmt: skip
    return ModelCardData(
        library_name=LIBRARIES.get(str(manifest["format"]), "tutelage"),
        pipeline_tag=pipeline,
        base_model=model if on_hub else None,
        tags=["knowledge-distillation", "tutelage", *(["int8"] if manifest["format"] == "int8" else [])],
        **known,
    )


def _section(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = recipe.get(name)
    return dict(section) if isinstance(section, Mapping) else {}


def _metric_of(summary: Mapping[str, Any], metric: str) -> float | None:
    best = (summary.get("students") or {}).get("distilled", {}).get("best", {})
    return float(best[metric]["mean"]) if metric in best else None


def _rows(summary: Mapping[str, Any], metric: str) -> Iterator[tuple[str, ...]]:
    """The rows of the table of models."""
    sizes, latency = summary.get("parameters") or {}, summary.get("latency") or {}

    def cost(who: str) -> tuple[str, str]:
        count, time = sizes.get(who), latency.get(who)
        return (
            f"{count:,}" if isinstance(count, int) else "not known",
            f"{time['p50_ms']:.2f} ms" if isinstance(time, Mapping) and "p50_ms" in time else "not known",
        )

    if metric in (teacher := summary.get("teacher") or {}):
        yield "teacher", _value(teacher[metric], metric), *cost("teacher")
    for who, title in (("baseline", "baseline"), ("distilled", "**this student**")):
        spread = ((summary.get("students") or {}).get(who) or {"best": {}})["best"].get(metric)
        if spread:
            values = spread.get("values") or []
            both = f" ({_value(min(values), metric)} to {_value(max(values), metric)})" if len(values) > 1 else ""
            yield title, _value(spread["mean"], metric) + both, *cost("student")


def _gain(gain: Mapping[str, Any] | None, metric: str) -> str | None:
    if not gain:
        return None
    scale, unit = (100, " points") if metric in PERCENTAGES else (1, "")
    interval = "no confidence interval with one seed"
    if gain.get("low") is not None:
        interval = f"95 % confidence interval {scale * gain['low']:+.2f} to {scale * gain['high']:+.2f}"
    return f"{scale * gain['mean']:+.2f}{unit} of {metric} ({interval})"


def _value(value: float, metric: str) -> str:
    return f"{value:.2%}" if metric in PERCENTAGES else f"{value:.4g}"


def _plain(text: Any) -> str:
    """Text with the special characters of Markdown escaped."""
    flat = re.sub(r"\s+", " ", str(text)).strip()
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", flat)


def _code(text: Any) -> str:
    """Text for a code span."""
    return re.sub(r"\s+", " ", str(text)).replace("`", "'")
