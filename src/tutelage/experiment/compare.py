"""The heart of every run: the baseline student and by a method, most often with a teacher, over seeds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tutelage.errors import CapabilityError
from tutelage.experiment.checks import (
    check_labels,
    check_method_runs,
    check_optimizer,
    check_output,
    check_separate,
    check_teachers,
    check_written,
)
from tutelage.experiment.measure import parameters
from tutelage.experiment.spec import (
    Arm,
    ExperimentSpec,
    RunContext,
    TeacherReferences,
    model_of,
    prepare_student_and_method,
    projectors,
)
from tutelage.experiment.summary import best_on_validation, keep_samples, keep_written, summarise
from tutelage.experiment.teacher_setup import examined, live_teacher, open_remote_teacher, taught_by
from tutelage.experiment.trainer import train_student
from tutelage.methods import check_capabilities
from tutelage.students import has_adapters, is_quantisation_aware, to_float_model


def compare(c: ExperimentSpec, ctx: RunContext) -> dict[str, Any]:
    """Run the comparison, or go on with it, and write its summary and student.

    Raises:
        CapabilityError: teacher, student, data and method do not fit; found before any student is trained.
        Interrupted: a stop was asked for; the state is saved.
    """
    if c.teacher is None and c.remote_teacher is None:
        check_capabilities(c.method(), None)
    untrained = None if c.teacher is None else c.teacher()
    c = c.beside(untrained)
    student = c.student(c.seeds[0])
    classes = check_output(c, ctx.device, student, "student")
    if untrained is not None:
        check_teachers(c, ctx.device, untrained)
    adapted_student, method = prepare_student_and_method(c, student, untrained, c.seeds[0])
    ctx.terminal.say(f"loss = {method.formula()}")
    for name, other in method.auxiliary_models(adapted_student).items():
        if check_output(c, ctx.device, other, name) != classes:
            raise CapabilityError(
                f"{name} does not score the student's {classes} classes", remedy="set its number of classes"
            )
    extra = projectors(method)
    if method.peers:
        beside = sum(parameters(peer) for peer in method.auxiliary_models(adapted_student).values())
        ctx.terminal.say(f"peers: {len(method.peers)}, of {beside:,} parameters, trained along and saved in models/")
    if has_adapters(adapted_student):
        learned = sum(p.numel() for p in adapted_student.parameters() if p.requires_grad)
        ctx.terminal.say(f"adapters: {learned:,} parameters learn, and are added to the weights that are exported")
    if is_quantisation_aware(adapted_student):
        ctx.terminal.say(
            "rounded: the student runs as in eight bits, and its figures are of it so; it is saved whole"
        )
    if extra:
        ctx.terminal.say(f"projectors: {extra:,} parameters, trained along and not exported")
    if adapted_student is not student:
        ctx.terminal.say(
            f"the student is exported as a {type(adapted_student).__name__}: {parameters(adapted_student):,} "
            f"parameters; the baseline student has {parameters(c.student(c.seeds[0])):,}"
        )
    check_optimizer(c, adapted_student, method)
    check_written(c, method)
    teacher = None if untrained is None else live_teacher(c, ctx, untrained)
    c = c.beside(model_of(teacher))
    student = c.student(c.seeds[0])
    adapted_student, method = prepare_student_and_method(c, c.student(c.seeds[0]), model_of(teacher), c.seeds[0])
    check_labels(c, model_of(teacher), student)
    references, teacher_scores = None, None
    if teacher is not None:
        check_separate(teacher.model, adapted_student)
        if c.cache is None:
            check_capabilities(method, teacher)
        references, teacher_scores = examined(c, ctx, teacher)
        if c.compared and c.validation is not None:
            c = replace(c, said=TeacherReferences(teacher, c.validation, ctx))
    arms: list[Arm] = ["baseline", "distilled"] if c.baseline else ["distilled"]
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with open_remote_teacher(c, ctx.terminal, method, classes) as remote:
        check_method_runs(c, ctx, adapted_student, method, teacher or remote)
        with taught_by(c, ctx, teacher or remote, method, classes) as asked:
            for seed in c.seeds:
                for arm in arms:
                    results[arm].append(train_student(c, ctx, arm, seed, asked, teacher, references, classes))
    known = None if remote is None else remote.facts
    exported = best_on_validation(c, results["distilled"])
    if ctx.run.writes:
        keep_samples(c, ctx, teacher, references, classes, exported)
        keep_written(c, ctx, teacher, exported)
    return summarise(
        c, ctx, teacher, to_float_model(adapted_student), teacher_scores, results, method, exported, known
    )
