"""What a finished experiment writes: its figures, its student, and samples for its report."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tutelage.evaluation.statistics import paired_difference, spread
from tutelage.experiment.measure import latencies, parameters
from tutelage.experiment.prepare import count_projectors, example_of, needs_teacher
from tutelage.experiment.sample_predictions import collect_samples, generate_continuations, has_samples, select_rows
from tutelage.experiment.spec import FIGURES, ExperimentSpec, ModelTeacher, RunContext
from tutelage.experiment.trainer import TrainingTeacher
from tutelage.files import write_text
from tutelage.methods import Method
from tutelage.models import load_weights
from tutelage.models.files import read_card
from tutelage.students import ReusedHead, to_float_model
from tutelage.teachers import RemoteTeacher


def write_summary(
    spec: ExperimentSpec,
    ctx: RunContext,
    used_teacher: ModelTeacher | RemoteTeacher | None,
    student: nn.Module,
    method: Method,
    teacher_scores: dict[str, Any] | None,
    results: dict[str, list[dict[str, Any]]],
    exported: str,
) -> dict[str, Any]:
    """Write ``summary.json`` and the exported student, and return the summary."""
    teacher = None if isinstance(used_teacher, RemoteTeacher) else used_teacher
    results, repeated = _distinct_seeds(ctx, spec.seeds, results)
    metric = spec.evaluation.metric
    student = to_float_model(student).to(ctx.device)
    models = {"student": student} if teacher is None else {"teacher": teacher.model, "student": student}
    sizes = {name: parameters(model) for name, model in models.items()}
    summary: dict[str, Any] = {
        "name": spec.name,
        "formula": method.formula(),
        "uses_teacher": needs_teacher(method),
        "classes": spec.evaluation.classes,
        "metric": metric,
        "seeds": [seed for seed in spec.seeds if seed not in repeated],
        "repeated_seeds": repeated,
        "parameters": sizes,
        "projectors": count_projectors(method),
        "latency": _latencies(spec, ctx, teacher, models),
        "students": {arm: _arm_figures(seeds) for arm, seeds in results.items()},
        "device": str(ctx.device),
        "processes": ctx.accelerator.num_processes,
    }
    if isinstance(used_teacher, RemoteTeacher):
        summary["remote_teacher"] = dict(used_teacher.facts)
    if teacher_scores is not None:
        # a function, or trees, have no parameters
        summary["capacity_ratio"] = sizes["student"] / sizes["teacher"] if sizes["teacher"] else None
        validation = teacher_scores["validation"]
        validation = {k: validation[k] for k in (metric, *FIGURES) if k in validation}
        summary["teacher"] = {**teacher_scores, "validation": validation}
    if "baseline" in results:
        summary["gain"] = {
            which: paired_difference(
                [r[which][metric] for r in results["distilled"]], [r[which][metric] for r in results["baseline"]]
            )
            for which in ("best", "last")
        }
    summary["exported"] = exported
    if ctx.run.writes:
        ctx.run.export(ctx.run.model(exported))
        if spec.evaluation.harness is not None:
            ctx.terminal.say("scoring on the tasks of lm-evaluation-harness")
            scored = ({} if teacher is None else {"teacher": teacher.model}) | load_students(spec, ctx, exported)
            summary["tasks"] = {name: spec.evaluation.harness(model) for name, model in scored.items()}
        write_text(ctx.run.summary, json.dumps(summary, indent=1) + "\n")
    ctx.accelerator.wait_for_everyone()
    return summary


def _distinct_seeds(
    ctx: RunContext, seeds: Sequence[int], results: dict[str, list[dict[str, Any]]]
) -> tuple[dict[str, list[dict[str, Any]]], list[int]]:
    """The results without those of seeds that gave the weights of an earlier seed in every arm, and these seeds."""
    digests = [
        tuple(_weights_digest(ctx.run.model(one[i]["training"])) for one in results.values())
        for i in range(len(seeds))
    ]
    new = [i for i, digest in enumerate(digests) if digest not in digests[:i]]
    repeated = [seed for i, seed in enumerate(seeds) if i not in new]
    if repeated:
        ctx.terminal.say(
            f"seeds {', '.join(map(str, repeated))} gave exactly the weights of an earlier seed and are not counted: "
            "to vary the initial weights, give a function as student; to vary the order, a loader that shuffles"
        )
    return {arm: [of_arm[i] for i in new] for arm, of_arm in results.items()}, repeated


def _weights_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _latencies(
    spec: ExperimentSpec, ctx: RunContext, teacher: ModelTeacher | None, models: Mapping[str, nn.Module]
) -> dict[str, Any]:
    example = next(iter(spec.evaluation.test))
    timed = {name: (model, example.for_teacher() if name == "teacher" else example) for name, model in models.items()}
    if getattr(teacher, "sharded", False):
        timed.pop("teacher")  # it is in one piece in main memory only, where it never runs
    return latencies(timed, ctx.device)


def _arm_figures(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of an arm over its seeds; curves and classes are those of the first seed."""
    keys = [k for k in FIGURES if k in results[0]["best"]]
    others = {
        name: {
            "parameters": other["parameters"],
            **{w: {k: spread([r["others"][name][w][k] for r in results]) for k in keys} for w in ("best", "last")},
        }
        for name, other in results[0].get("others", {}).items()
    }
    return {
        **({"others": others} if others else {}),
        "best": {k: spread([r["best"][k] for r in results]) for k in keys},
        "last": {k: spread([r["last"][k] for r in results]) for k in keys},
        "reliability": results[0]["best"].get("reliability"),
        "per_class": results[0]["best"].get("per_class"),
        "per_target": results[0]["best"].get("per_target"),
        "seconds": spread([r["seconds"] for r in results]),
    }


def best_on_validation(spec: ExperimentSpec, results: Sequence[Mapping[str, Any]]) -> str:
    """The name of the training whose student is exported: the best on validation, or the first without validation."""
    if spec.evaluation.validation is None:
        return str(results[0]["training"])
    scores = [(r["validation"] or r["last"])[spec.evaluation.metric] for r in results]
    return str(results[scores.index(max(scores))]["training"])


def load_student(spec: ExperimentSpec, folder: Path) -> nn.Module:
    """The student in a folder of a finished training, as a float module, in evaluation mode, on the CPU."""
    reused = read_card(folder).get("reused_head")
    model = to_float_model(spec.source.build_student(spec.seeds[0]).cpu())
    if reused is not None:
        model = ReusedHead(model, **reused)
    load_weights(model, folder)
    return model.eval()


def load_students(spec: ExperimentSpec, ctx: RunContext, exported: str) -> dict[str, nn.Module]:
    """The exported student and the baseline student of its seed, by arm."""
    names = {"baseline": exported.replace("distilled", "baseline", 1)} if spec.baseline else {}
    names["distilled"] = exported
    return {arm: load_student(spec, ctx.run.model(name)).to(ctx.device) for arm, name in names.items()}


def write_predictions(
    spec: ExperimentSpec, ctx: RunContext, teacher: TrainingTeacher, classes: int, exported: str
) -> None:
    """Write samples of the test split: mostly those on which teacher and exported student disagree."""
    evaluation = spec.evaluation
    count = evaluation.samples.predictions
    if not count or (teacher.live is None and not spec.baseline) or not has_samples(example_of(spec), classes):
        return
    outputs = None if teacher.on_test is None else (x for x in teacher.on_test if isinstance(x, Tensor))
    samples = collect_samples(evaluation.test, outputs, load_students(spec, ctx, exported), count, ctx.device)
    content = {"exported": exported, **samples.as_json(evaluation.describe)}
    write_text(
        ctx.run.json_file("samples", "test"), json.dumps(content, separators=(",", ":"), ensure_ascii=False) + "\n"
    )


def write_generations(spec: ExperimentSpec, ctx: RunContext, teacher: ModelTeacher | None, exported: str) -> None:
    """Write how language models continue texts of the test split: the teacher and the students."""
    evaluation = spec.evaluation
    if evaluation.tokenizers is None or not evaluation.samples.generations:
        return
    own, teachers = evaluation.tokenizers
    models: dict[str, tuple[nn.Module, Any]] = {} if teacher is None else {"teacher": (teacher.model, teachers)}
    models |= {arm: (model, own) for arm, model in load_students(spec, ctx, exported).items()}
    models = {name: one for name, one in models.items() if callable(getattr(one[0], "generate", None))}
    rows = select_rows(evaluation.test, evaluation.samples.generations)
    if not models or not rows:
        return
    tokens = evaluation.samples.max_new_tokens
    ctx.terminal.say(f"samples: {' and '.join(models)} continue {len(rows)} texts of the test split")
    texts = generate_continuations(models, rows, tokens, ctx.device)
    content = {"exported": exported, "tokens": tokens, "models": list(models), "texts": texts}
    write_text(ctx.run.json_file("samples", "written"), json.dumps(content, indent=1, ensure_ascii=False) + "\n")
