"""One experiment from its specification to its summary: the baseline student and the distilled one, for all seeds."""

from dataclasses import replace
from typing import Any

from torch import nn

from tutelage.errors import CapabilityError
from tutelage.experiment import checks
from tutelage.experiment.measure import parameters
from tutelage.experiment.prepare import (
    bind_teacher,
    build_teacher,
    count_projectors,
    model_of,
    prepare_student_and_method,
)
from tutelage.experiment.quantised_speed import slow_types
from tutelage.experiment.save_check import check_saves
from tutelage.experiment.spec import Arm, ExperimentSpec, RunContext
from tutelage.experiment.summary import best_on_validation, write_generations, write_predictions, write_summary
from tutelage.experiment.teacher_setup import (
    ReferenceOutputs,
    evaluate_reference,
    open_remote_teacher,
    open_training_teacher,
    train_teacher,
)
from tutelage.experiment.trainer import TrainingTeacher, train_student
from tutelage.methods import Method, check_capabilities
from tutelage.progress import Terminal
from tutelage.students import describe_adapters, has_adapters, is_quantisation_aware


def compare(spec: ExperimentSpec, ctx: RunContext) -> dict[str, Any]:
    """Run the experiment, or continue it, and write its summary and its student."""
    if spec.teacher is None:
        check_capabilities(spec.source.build_method(), None)
    model = build_teacher(spec)
    spec = bind_teacher(spec, model)
    initial = spec.source.build_student(spec.seeds[0])
    classes = checks.check_output(spec, ctx.device, initial, "student")
    checks.check_evaluation_labels(spec)
    if model is not None:
        checks.check_teachers(spec, ctx.device, model)
    student, method = prepare_student_and_method(spec, initial, model, spec.seeds[0])
    _check_prepared(spec, ctx, initial, student, method, classes)
    for line in slow_types(spec, model, student, ctx.device):
        ctx.terminal.say(f"note: {line}")
    if ctx.run.writes:
        check_saves(spec, student, initial, method, model, ctx)
    live = None if model is None else train_teacher(spec, ctx, model)
    if spec.teacher is not None and (spec.teacher.is_trained_first or model_of(live) is not model):
        spec = bind_teacher(spec, model_of(live))  # student and method were prepared with other teacher weights
        initial = spec.source.build_student(spec.seeds[0])
        student, method = prepare_student_and_method(spec, initial, model_of(live), spec.seeds[0])
    checks.check_labels(spec, model_of(live), initial)
    teacher, scores = TrainingTeacher(live), None
    if live is not None:
        checks.check_separate(live.model, student)
        if spec.teacher is not None and spec.teacher.cache is None:
            check_capabilities(method, live)
        outputs, scores = evaluate_reference(spec, ctx, live)
        teacher = replace(teacher, on_test=outputs)
        if spec.evaluation.by_teacher and spec.evaluation.validation is not None:
            teacher = replace(teacher, on_validation=ReferenceOutputs(live, spec.evaluation.validation, ctx))
    arms: list[Arm] = ["baseline", "distilled"] if spec.baseline else ["distilled"]
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with open_remote_teacher(spec, ctx.terminal, method, classes) as remote:
        checks.check_method_runs(spec, ctx, student, method, live or remote)
        with open_training_teacher(spec, ctx, live or remote, method, classes) as signals:
            teacher = replace(teacher, signals=signals)
            for seed in spec.seeds:
                for arm in arms:
                    results[arm].append(train_student(spec, ctx, arm, seed, teacher, classes))
    exported = best_on_validation(spec, results["distilled"])
    if ctx.run.writes:
        write_predictions(spec, ctx, teacher, classes, exported)
        write_generations(spec, ctx, live, exported)
    return write_summary(spec, ctx, live or remote, student, method, scores, results, exported)


def _check_prepared(
    spec: ExperimentSpec, ctx: RunContext, initial: nn.Module, student: nn.Module, method: Method, classes: int
) -> None:
    """Run the checks that need no trained teacher, and print what is trained."""
    ctx.terminal.say(f"loss = {method.formula()}")
    for pair in method.describe_pairs():
        ctx.terminal.say(f"pair of {pair}")
    for name, other in method.auxiliary_models(student).items():
        if checks.check_output(spec, ctx.device, other, name) != classes:
            raise CapabilityError(
                f"{name} does not score the student's {classes} classes", remedy="set its number of classes"
            )
    _print_student(spec, ctx.terminal, initial, student, method)
    checks.check_trains(spec, ctx.device, student, method)
    checks.check_optimizer(spec, student, method)
    checks.check_generates(spec, method)
    checks.check_tokenizers(spec, method)


def _print_student(
    spec: ExperimentSpec, terminal: Terminal, initial: nn.Module, student: nn.Module, method: Method
) -> None:
    if method.peers:
        size = sum(parameters(peer) for peer in method.auxiliary_models(student).values())
        terminal.say(
            f"peers: {len(method.peers)} with {size:,} parameters; trained with the student, saved in models/"
        )
    if has_adapters(student):
        terminal.say(f"LoRA: {describe_adapters(student)}; the adapters are merged into the exported weights")
    if is_quantisation_aware(student):
        terminal.say("quantisation-aware training: metrics are measured with simulated int8; float weights are saved")
    projectors = count_projectors(method)
    if projectors:
        terminal.say(f"projectors: {projectors:,} parameters; trained with the student, not exported")
    if student is not initial:
        before = parameters(spec.source.build_student(spec.seeds[0]))
        terminal.say(
            f"the student is exported as a {type(student).__name__}: {parameters(student):,} parameters; "
            f"the baseline student has {before:,}"
        )
