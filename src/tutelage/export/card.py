"""The model card beside an export: what it is, where it came from, and what it is good for, in figures of its run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

PIPELINES = {
    "images": "image-classification", "classes": "text-classification", "multi-label": "text-classification",
    "regression": "text-classification", "tokens": "token-classification", "mlm": "fill-mask",
    "causal": "text-generation", "embedding": "sentence-similarity",
}  # fmt: skip
"""What the Hugging Face hub calls each task."""

LIBRARIES = {"hf": "transformers", "onnx": "onnx", "int8": "onnx", "torch-export": "pytorch"}

KINDS = {
    "images": "an image classifier", "classes": "a classifier of texts", "multi-label": "a classifier of texts",
    "regression": "a model that gives numbers for texts", "tokens": "a classifier of words",
    "mlm": "a masked language model", "causal": "a causal language model", "embedding": "an encoder of sentences",
}  # fmt: skip

FORMATS = {
    "safetensors": "weights (safetensors) and how to build the model again",
    "hf": "a folder that transformers loads",
    "onnx": "an ONNX graph, any number of rows (and of tokens)",
    "int8": "an ONNX graph with eight-bit weights, any number of rows (and of tokens)",
    "torch-export": "a program of torch.export, any number of rows (and of tokens)",
}

HOW = {
    "hf": '```python\nfrom transformers import {auto}\nmodel = {auto}.from_pretrained("PATH")\n```',
    "onnx": '```python\nimport onnxruntime\nsession = onnxruntime.InferenceSession("PATH/model.onnx")\n```',
    "int8": '```python\nimport onnxruntime\nsession = onnxruntime.InferenceSession("PATH/model.onnx")\n```',
    "torch-export": '```python\nimport torch\nmodel = torch.export.load("PATH/model.pt2").module()\n```',
    "safetensors": '```python\nimport tutelage\nmodel = tutelage.models.load_model("PATH")\n```',
}
"""How a format is loaded without, or else with, tutelage."""


def model_card(manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """A model card in Markdown, with the front matter that the Hugging Face hub reads.

    Args:
        manifest: of the export.
        facts: ``summary`` and ``recipe`` of the run, where there is one; ``auto``, transformers' class.
    """
    summary, recipe = facts.get("summary") or {}, facts.get("recipe") or {}
    name = str(summary.get("name") or recipe.get("name") or "model")
    parts = [
        _front(manifest, summary, recipe, name),
        f"# {_plain(name)}\n\n{_what(manifest, summary, recipe)}",
        _figures(manifest, summary),
        _check(manifest),
        _use(manifest, facts),
        _origin(summary, recipe),
        "## Licence\n\nThis card names no licence, for none is known to the tool that wrote it. Which one holds "
        "follows from the licences of the teacher's weights, of the data, and of the student's first weights; "
        "whoever passes this model on has to look at them and name one.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(manifest: Mapping[str, Any], summary: Mapping[str, Any], recipe: Mapping[str, Any], name: str) -> str:
    task = str(manifest["task"])
    front: dict[str, Any] = {
        "library_name": LIBRARIES.get(str(manifest["format"]), "tutelage"),
        "pipeline_tag": PIPELINES.get(task, "other"),
        "tags": ["knowledge-distillation", "tutelage"],
    }
    if manifest["format"] == "int8":
        front["tags"].append("int8")
    base = _hub(_section(recipe, "teacher").get("model"))
    if base:
        front["base_model"] = base
    data = _section(recipe, "data")
    if data.get("source") in ("hf", "hub") and data.get("path"):
        front["datasets"] = [str(data["path"])]
    metric, value = _quality(summary, "distilled")
    if metric is not None and value is not None:
        front["metrics"] = [metric]
        front["model-index"] = [{
            "name": name,
            "results": [{
                "task": {"type": PIPELINES.get(task, "other")},
                "dataset": {"name": str(data.get("source", "the run's own data")),
                            "type": str(data.get("path") or data.get("source") or "private"), "split": "test"},
                "metrics": [{"type": metric, "value": round(value, 6)}],
            }],
        }]  # fmt: skip
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def _hub(model: Any) -> str | None:
    """The id on the hub of a model as recipes name it; ``None`` for a folder or another library."""
    kind, _, name = str(model or "").partition(":")
    return name if kind == "hf" and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith(".") else None


def _section(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = recipe.get(name)
    return dict(found) if isinstance(found, Mapping) else {}


def _quality(summary: Mapping[str, Any], who: str) -> tuple[str | None, float | None]:
    metric = str(summary.get("metric", "accuracy"))
    row = (summary.get("students") or {}).get(who, {}).get("best", {})
    if metric not in row:
        return None, None
    return metric, float(row[metric]["mean"])


def _what(manifest: Mapping[str, Any], summary: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    kind = KINDS.get(str(manifest["task"]), "a model")
    teacher = _teacher(recipe)
    by = f", distilled from {teacher}" if teacher else ", distilled" if summary.get("taught") else ""
    lines = [f"{kind[0].upper()}{kind[1:]}{by}. In this folder: {FORMATS[str(manifest['format'])]}."]
    if manifest.get("classes"):
        shown = [_plain(c) for c in manifest["classes"][:20]]
        more = f" and {len(manifest['classes']) - 20} more" if len(manifest["classes"]) > 20 else ""
        lines.append(f"Labels, in the order of the outputs: {', '.join(shown)}{more}.")
    return "\n\n".join(lines)


def _teacher(recipe: Mapping[str, Any]) -> str | None:
    teacher = _section(recipe, "teacher")
    if teacher.get("members"):
        return f"an ensemble of {len(teacher['members'])} teachers"
    if teacher.get("endpoint"):
        return f"`{_code(_section(teacher, 'endpoint').get('model', 'a model behind a server'))}`"
    known = teacher.get("model") or teacher.get("class")
    return f"`{_code(known)}`" if known else None


def _figures(manifest: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    if not summary:
        return "## Figures\n\nThis model was exported without the folder of its run: nothing is known of its figures."
    if "workflow" in summary:
        return f"## Figures\n\n{_plain(str(summary.get('verdict', '')))}"
    metric = str(summary.get("metric", "accuracy"))
    rows: list[tuple[str, ...]] = []
    teacher = summary.get("teacher") or {}
    sizes, speed = summary.get("parameters") or {}, summary.get("latency") or {}
    for who, title in (("baseline", "the same baseline student"), ("distilled", "**this student**")):
        row = (summary.get("students") or {}).get(who)
        if row and metric in row["best"]:
            rows.append((title, _spread(row["best"][metric], metric), _count(sizes.get("student")),
                         _ms(speed.get("student"))))  # fmt: skip
    if metric in teacher:
        whole = (
            "teacher", _value(teacher[metric], metric), _count(sizes.get("teacher")), _ms(speed.get("teacher"))
        )  # fmt: skip
        rows.insert(0, whole)
    lines = [
        "## Figures",
        "Of the test split, which was read once for each finished model; "
        f"mean over {len(summary.get('seeds', [0]))} seeds. Latency: one sample on "
        f"{summary.get('device', 'cpu')}, in the run itself, which other machines will not repeat.",
        _table(("", metric, "parameters", "latency, p50"), rows),
    ]
    gain = (summary.get("gain") or {}).get("best")
    if gain:
        lines.append(f"Gain over the same baseline student: {_gain(gain, metric)}.")
    _, mine = _quality(summary, "distilled")
    if metric in teacher and mine is not None and metric != "perplexity" and teacher[metric]:
        lines.append(f"Retention: {mine / teacher[metric]:.1%} of the teacher's {metric}.")
    measured = manifest.get("measured")
    if measured:
        pair = [measured[w].get(metric) for w in ("source", "export")]
        if None not in pair:
            lines.append(
                f"Rounded to eight bits, as it is here: {_value(pair[1], metric)}, where this very student has "
                f"{_value(pair[0], metric)} unrounded."
            )
    return "\n\n".join(lines)


def _check(manifest: Mapping[str, Any]) -> str:
    check = manifest["check"]
    lines = [f"Compared with the student it was made from on {check['rows']} inputs ({check['inputs']})."]
    if "tolerance" in check:
        lines.append(
            f"Greatest difference of any output: {check['max_difference']:.2g}, allowed {check['tolerance']:g}."
        )
    else:
        what = {"embedding": "Mean cosine", "regression": "Correlation"}.get(manifest["task"], "Equal answers")
        lines.append(
            f"{what}: {check['agreement']:.2%}. Greatest difference of any output: {check['max_difference']:.2g}."
        )
        how = manifest.get("how", {})
        ranges = (
            f"fixed by {how['calibration_rows']} rows that are not of the test split"
            if how.get("rounding") == "static"
            else "those of each input as it comes"
        )
        lines.append(f"Ranges of activations are {ranges}.")
    return "## Check\n\n" + " ".join(lines)


def _use(manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    how = HOW[str(manifest["format"])].replace("{auto}", str(facts.get("auto") or "AutoModel"))
    example = "picture.png" if manifest["task"] == "images" else '"a text"'
    given = manifest["preprocessing"]
    if manifest["task"] == "images":
        shape = f"{given['channels']}x{given['size']}x{given['size']}"
        first = (
            f"An image is resized (shorter side {max(given['size'], round(given['size'] / given.get('crop', 1.0)))}, "
            f"bilinear), its centre cut out, {shape}, divided by 255, and normalised with mean {given['mean']} and "
            f"standard deviation {given['std']}."
        )
    else:
        first = f"A text is cut by the tokenizer beside the model, to at most {given.get('max_length')} tokens."
    return (
        f"## Use\n\n    tutelage predict PATH {example}\n\n{first} Inputs: {', '.join(manifest['inputs'])}. Output: "
        f"{manifest['output']}. `export.json` has the same for programs.\n\n{how}"
    )


def _origin(summary: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    lines = []
    data, method = _section(recipe, "data"), _section(recipe, "method")
    if data:
        named = {k: data[k] for k in ("source", "path", "task", "labels", "size", "max_length") if data.get(k)}
        lines.append("Data: " + ", ".join(f"{k} `{_code(v)}`" for k, v in named.items()))
    if _teacher(recipe):
        lines.append(f"Teacher: {_teacher(recipe)}")
    student = _section(recipe, "student")
    if student:
        lines.append(f"Student: `{_code(student.get('model') or student.get('class'))}`")
    if method:
        kind = method.get("kind") or method.get("class")
        lines.append(f"Method: `{_code(kind)}`")
    if summary.get("formula"):
        lines.append(f"Loss: `{_code(summary['formula'])}`")
    train = _section(recipe, "train")
    if train:
        budget = f"{train['steps']} steps" if train.get("steps") else f"{train.get('epochs')} epochs"
        lines.append(f"Training: {budget}, batches of {train.get('batch_size', 'the loader')}")
    if summary.get("exported"):
        lines.append(f"Which of the run's students: `{_code(summary['exported'])}`, the best on validation")
    return "## Where it comes from\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""


# Words -------------------------------------------------------------------------------------------------

SHARES = ("accuracy", "f1", "recall", "agreement")


def _value(value: float, metric: str) -> str:
    return f"{value:.2%}" if metric in SHARES else f"{value:.4g}"


def _spread(spread: Mapping[str, Any], metric: str) -> str:
    text = _value(spread["mean"], metric)
    values = spread.get("values") or []
    return text + (f" ({_value(min(values), metric)} to {_value(max(values), metric)})" if len(values) > 1 else "")


def _gain(gain: Mapping[str, Any], metric: str) -> str:
    scale, unit = (100, " points") if metric in SHARES else (1, "")
    interval = "no interval, for there is one seed"
    if gain.get("low") is not None:
        interval = f"95 % interval {scale * gain['low']:+.2f} to {scale * gain['high']:+.2f}"
    return f"{scale * gain['mean']:+.2f}{unit} of {metric} ({interval})"


def _count(n: Any) -> str:
    return f"{n:,}" if isinstance(n, int) else "not known"


def _ms(found: Any) -> str:
    return f"{found['p50_ms']:.2f} ms" if isinstance(found, Mapping) and "p50_ms" in found else "not known"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _plain(text: Any) -> str:
    """A string of the data as plain text in Markdown."""
    flat = re.sub(r"\s+", " ", str(text)).strip()
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", flat)


def _code(text: Any) -> str:
    """A string of the data between backticks."""
    return re.sub(r"\s+", " ", str(text)).replace("`", "'")
