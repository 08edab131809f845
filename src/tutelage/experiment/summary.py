"""What a finished comparison leaves: its figures, its student, and samples for its page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tutelage.evaluation.statistics import paired, spread
from tutelage.experiment.continuations import continued, drawn
from tutelage.experiment.measure import latencies, parameters
from tutelage.experiment.sample_predictions import collected, has_samples
from tutelage.experiment.spec import FIGURES, ExperimentSpec, RunContext, TeacherReferences, example_of, projectors
from tutelage.experiment.teacher_setup import is_taught
from tutelage.experiment.teachers import ModelTeacher
from tutelage.files import write_text
from tutelage.methods import Method
from tutelage.models import load_weights
from tutelage.models.files import read_card
from tutelage.students import ReusedHead, to_float_model
from tutelage.teachers import LiveTeacher


def summarise(
    c: ExperimentSpec,
    ctx: RunContext,
    teacher: ModelTeacher | None,
    student: nn.Module,
    teacher_scores: dict[str, Any] | None,
    results: dict[str, list[dict[str, Any]]],
    method: Method,
    exported: str,
    remote_teacher: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The figures of the run, written to ``summary.json``, and the exported student."""
    student.to(ctx.device)
    models = {"student": student} if teacher is None else {"teacher": teacher.model, "student": student}
    example = next(iter(c.test))
    seen = {name: (model, example.for_teacher() if name == "teacher" else example) for name, model in models.items()}
    if isinstance(teacher, LiveTeacher) and teacher.sharded:
        seen.pop("teacher")  # whole it is in main memory alone, where it is as slow as it never runs
    speed = latencies(seen, ctx.device)
    sizes = {name: parameters(model) for name, model in models.items()}

    def row(found: list[dict[str, Any]]) -> dict[str, Any]:
        keys = [k for k in FIGURES if k in found[0]["best"]]
        others = found[0].get("others", {})
        beside = {
            name: {
                "parameters": others[name]["parameters"],
                **{w: {k: spread([r["others"][name][w][k] for r in found]) for k in keys} for w in ("best", "last")},
            }
            for name in others
        }
        return {
            **({"others": beside} if beside else {}),
            "best": {k: spread([r["best"][k] for r in found]) for k in keys},
            "last": {k: spread([r["last"][k] for r in found]) for k in keys},
            "reliability": found[0]["best"].get("reliability"),
            "per_class": found[0]["best"].get("per_class"),
            "seconds": spread([r["seconds"] for r in found]),
        }

    summary: dict[str, Any] = {
        "name": c.name,
        "formula": method.formula(),
        "taught": is_taught(method),
        "classes": c.classes,
        "metric": c.metric,
        "seeds": list(c.seeds),
        "parameters": sizes,
        "projectors": projectors(method),
        "latency": speed,
        "students": {arm: row(found) for arm, found in results.items()},
        "device": str(ctx.device),
        "processes": ctx.accelerator.num_processes,
    }
    if remote_teacher is not None:
        summary["remote_teacher"] = dict(remote_teacher)
    if teacher_scores is not None:
        summary["capacity_ratio"] = sizes["student"] / sizes["teacher"]
        kept = [k for k in (c.metric, *FIGURES) if k in teacher_scores["validation"]]
        on_validation = {k: teacher_scores["validation"][k] for k in kept}
        summary["teacher"] = {**teacher_scores, "validation": on_validation}
    if "baseline" in results:
        summary["gain"] = {
            which: paired(
                [r[which][c.metric] for r in results["distilled"]], [r[which][c.metric] for r in results["baseline"]]
            )
            for which in ("best", "last")
        }
    summary["exported"] = exported
    if ctx.run.writes:
        ctx.run.export(ctx.run.model(exported))
        if c.harness is not None:
            summary["tasks"] = scored_by_tasks(c, c.harness, ctx, teacher, exported)
        write_text(ctx.run.summary, json.dumps(summary, indent=1) + "\n")
    ctx.accelerator.wait_for_everyone()
    return summary


def best_on_validation(c: ExperimentSpec, results: Sequence[Mapping[str, Any]]) -> str:
    """The training whose student is exported: the best on validation; the first where there is none."""
    if c.validation is None:
        return str(results[0]["training"])
    key = [(r["validation"] or r["last"])[c.metric] for r in results]
    return str(results[key.index(max(key))]["training"])


def exported_student(c: ExperimentSpec, ctx: RunContext, summary: dict[str, Any]) -> nn.Module:
    """The exported student as a plain module, in evaluation mode, on the CPU."""
    return finished_student(c, Path(ctx.run.path) / "student")


def finished_student(c: ExperimentSpec, folder: Path) -> nn.Module:
    """The student in a folder of a finished training, likewise."""
    reused = read_card(folder).get("reused_head")
    model = to_float_model(c.student(c.seeds[0]).cpu())
    if reused is not None:
        model = ReusedHead(model, **reused)
    load_weights(model, folder)
    return model.eval()


def finished_pair(c: ExperimentSpec, ctx: RunContext, exported: str) -> dict[str, nn.Module]:
    """The exported student and, where there is one, the one that was trained alone under its seed, by arm."""
    names = {"baseline": exported.replace("distilled", "baseline", 1)} if c.baseline else {}
    names["distilled"] = exported
    return {arm: finished_student(c, ctx.run.model(name)).to(ctx.device) for arm, name in names.items()}


def scored_by_tasks(
    c: ExperimentSpec,
    harness: Callable[[nn.Module], dict[str, Any]],
    ctx: RunContext,
    teacher: ModelTeacher | None,
    exported: str,
) -> dict[str, Any]:
    """What tasks by name say of the teacher, of the exported student, and of the one alone under its seed."""
    ctx.terminal.say("scoring by tasks of lm-evaluation-harness")
    models = {} if teacher is None else {"teacher": teacher.model}
    return {name: harness(model) for name, model in (models | finished_pair(c, ctx, exported)).items()}


def keep_samples(
    c: ExperimentSpec,
    ctx: RunContext,
    teacher: ModelTeacher | None,
    references: TeacherReferences | None,
    classes: int,
    exported: str,
) -> None:
    """Write where the teacher and the exported student disagree, and some samples on which they do not."""
    if not c.samples.predictions or (teacher is None and not c.baseline) or not has_samples(example_of(c), classes):
        return
    said = None if references is None else (x for x in references if isinstance(x, Tensor))
    found = collected(c.test, said, finished_pair(c, ctx, exported), c.samples.predictions, ctx.device)
    text = json.dumps({"exported": exported, **found.as_json(c.show)}, separators=(",", ":"), ensure_ascii=False)
    write_text(ctx.run.samples("test"), text + "\n")


def keep_written(c: ExperimentSpec, ctx: RunContext, teacher: ModelTeacher | None, exported: str) -> None:
    """Write how teacher and students go on with texts of the test split, where they are language models."""
    if c.tokenizers is None or not c.samples.generations:
        return
    mine, theirs = c.tokenizers
    models: dict[str, tuple[nn.Module, Any]] = {} if teacher is None else {"teacher": (teacher.model, theirs)}
    models |= {arm: (model, mine) for arm, model in finished_pair(c, ctx, exported).items()}
    models = {name: one for name, one in models.items() if callable(getattr(one[0], "generate", None))}
    rows = drawn(c.test, c.samples.generations)
    if not models or not rows:
        return
    ctx.terminal.say(f"samples: {' and '.join(models)} go on with {len(rows)} texts of the test split")
    found = continued(models, rows, c.samples.max_new_tokens, ctx.device)
    known = {"exported": exported, "tokens": c.samples.max_new_tokens, "models": list(models), "texts": found}
    write_text(ctx.run.samples("written"), json.dumps(known, indent=1, ensure_ascii=False) + "\n")
