"""Claims from the literature, each with its source, its arms and its test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tutelage import losses
from tutelage.lab import llm
from tutelage.lab.arms import SIZES, TRIPLE, Results
from tutelage.lab.statements import (
    ExperimentPlot,
    ExperimentResult,
    PlotPoint,
    StatementResult,
    exact,
    gain,
    point,
    within,
)

TEMPERATURES = (1, 2, 4, 8, 20)
WEIGHTS = {"last epoch": "last", "best on validation": "best"}

Accuracies = dict[str, dict[str, list[float]]]
"""Test accuracy by label, then ``last`` or ``best`` (weights); one value a seed."""


@dataclass(frozen=True)
class Claim:
    """An experiment.

    Attributes:
        claim: what the source states.
        source: authors and year, or what it is where no paper states it.
        design: what is compared.
        arms: names of the :data:`~tutelage.lab.arms.ARMS` that the test reads.
        test: reads them.
    """

    claim: str
    source: str
    design: str
    arms: Sequence[str]
    test: Callable[[Results], ExperimentResult]


def _accuracies(results: Results, arms: dict[str, tuple[str, str]]) -> Accuracies:
    """By label, of an arm (``baseline`` or ``distilled``) of a run, or of a row of a multi-stage run."""

    def values(arm: str, which: str, weights: str) -> list[float]:
        read = results.accuracy if "students" in results.summary(arm) else results.row
        return read(arm, which, weights)

    return {
        label: {weights: values(arm, which, weights) for weights in ("last", "best")}
        for label, (arm, which) in arms.items()
    }


def _bars(accuracies: Accuracies) -> ExperimentPlot:
    """Test accuracy of each arm."""
    series = {
        name: [point(label, values[weights]) for label, values in accuracies.items()]
        for name, weights in WEIGHTS.items()
    }
    return ExperimentPlot(
        "", "test accuracy", series, percent=True, caption="Test accuracy of each arm: mean and interval."
    )


def _compare(
    results: Results, arms: dict[str, tuple[str, str]], statements: Sequence[tuple[str, str, str]]
) -> ExperimentResult:
    """Gains of one arm over another (statement, label, other label), with the weights of the last epoch."""
    accuracies = _accuracies(results, arms)
    gains = [gain(text, accuracies[a]["last"], accuracies[b]["last"]) for text, a, b in statements]
    return ExperimentResult(gains, [_bars(accuracies)], accuracies=accuracies)


def soft_labels(results: Results) -> ExperimentResult:
    """A student with soft labels against the same student without them."""
    arms = {"baseline": ("kd", "baseline"), "distilled": ("kd", "distilled")}
    return _compare(results, arms, [("soft labels raise the student's accuracy", "distilled", "baseline")])


def temperature(results: Results) -> ExperimentResult:
    """Accuracy over T; validation chooses between T = 4 and T = 8."""
    arms = {t: "kd" if t == 4 else f"T{t}" for t in TEMPERATURES}
    accuracies = _accuracies(results, {f"T={t}": (arm, "distilled") for t, arm in arms.items()})
    middle = max((4, 8), key=lambda t: results.validation(arms[t]))
    logits = results.logits("teacher")
    classes, top = logits.shape[-1], logits.topk(2).values
    hot = (torch.softmax(logits / 1e6, -1) - 1 / classes).abs().max()
    clear = (top[:, 0] - top[:, 1]) > 1e-3
    one_hot = torch.nn.functional.one_hot(logits[clear].argmax(-1), classes)
    cold = (torch.softmax(logits[clear] / 1e-5, -1) - one_hot).abs().max()
    best, coldest, hottest = (accuracies[f"T={t}"]["last"] for t in (middle, 1, 20))
    statements = [
        gain(f"T={middle} (chosen from 4 and 8 on validation) is better than T=1", best, coldest),
        gain(f"T={middle} is better than T=20", best, hottest),
        exact("T to infinity gives the uniform distribution (T = 1e6)", float(hot), 1e-4),
        exact("T to 0 gives the one-hot vector of the largest logit (T = 1e-5)", float(cold), 1e-9),
    ]
    series = {
        name: [point(t, accuracies[f"T={t}"][weights]) for t in TEMPERATURES] for name, weights in WEIGHTS.items()
    }
    plot = ExperimentPlot("temperature", "test accuracy", series, log_x=True, percent=True,
                          caption="Test accuracy over T.")  # fmt: skip
    return ExperimentResult(statements, [plot], accuracies=accuracies)


def _soft_gradient(student: Tensor, teacher: Tensor, t: float, *, squared: bool) -> Tensor:
    """Gradient of the soft loss by the student's logits, row by row, with or without the factor T^2."""
    x = student.clone().requires_grad_()
    loss = losses.kd(x, teacher, temperature=t, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)
    return grad if squared else grad / t**2


def t_squared(results: Results) -> ExperimentResult:
    """Norm of the gradient over T, on the validation split, of baseline students."""
    teacher = results.logits("teacher")
    ts = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
    norms: dict[bool, list[list[float]]] = {True: [], False: []}
    for seed in results.base.seeds:
        student = results.logits(f"baseline-seed{seed}")
        for squared, curves in norms.items():
            grads = (_soft_gradient(student, teacher, t, squared=squared) for t in ts)
            curves.append([float(grad.norm(dim=-1).mean()) for grad in grads])

    def slopes(squared: bool, start: int, stop: int | None = None) -> list[float]:
        x = [math.log(t) for t in ts[start:stop]]
        return [
            statistics.linear_regression(x, [math.log(v) for v in curve[start:stop]]).slope
            for curve in norms[squared]
        ]

    statements = [
        within("without the factor, the gradient falls as 1/T^2 (slope on log-log axes, T from 16 up)",
               slopes(False, 4), -2.1, -1.9),
        within("with the factor, the gradient does not depend on T (slope, T from 16 up)",
               slopes(True, 4), -0.1, 0.1),
    ]  # fmt: skip
    series = {
        name: [point(t, [curve[i] for curve in norms[squared]]) for i, t in enumerate(ts)]
        for name, squared in (("without the factor", False), ("with T^2", True))
    }
    plot = ExperimentPlot("temperature", "mean norm of the gradient", series, log_x=True, log_y=True,
                          caption="Norm of the soft loss's gradient by the student's logits, over T.")  # fmt: skip
    usual = statistics.fmean(slopes(False, 1, 4))
    note = (
        f"For the usual T, 2 to 8, the slope without the factor is {usual:.2f}: the law holds for large T, where the "
        "logits over T are small."
    )
    return ExperimentResult(statements, [plot], [note])


def gradient(results: Results) -> ExperimentResult:
    """Autograd against the closed form, on real logits."""
    teacher = results.logits("teacher")
    points: list[PlotPoint] = []
    for t in (0.5, 1.0, 2.0, 4.0, 8.0, 20.0):
        errors = []
        for seed in results.base.seeds:
            student = results.logits(f"baseline-seed{seed}")
            closed_form = (torch.softmax(student / t, -1) - torch.softmax(teacher / t, -1)) / t
            autograd = _soft_gradient(student, teacher, t, squared=False)
            errors.append(float((closed_form - autograd).abs().max()))
        points.append(PlotPoint(t, max(errors)))
    statement = exact("dL/dz = (p_S - p_T) / T, largest error over validation images, classes, seeds and T",
                      max(p.mean for p in points), 1e-12)  # fmt: skip
    plot = ExperimentPlot("temperature", "largest error", {"autograd against closed form": points}, log_x=True,
                          log_y=True, caption="Largest error of autograd against the closed form.")  # fmt: skip
    note = "L is KL(p_T || p_S) at T without the factor T^2; with it, the gradient is T (p_S - p_T)."
    return ExperimentResult([statement], [plot], [note])


def dark_knowledge(results: Results) -> ExperimentResult:
    """Whether classes that are similar for the teacher are similar for both students."""
    from scipy.stats import spearmanr

    t = 4
    teacher = results.similarity("teacher", t)
    distilled, baseline = (
        [
            float(spearmanr(results.similarity(f"{arm}-seed{seed}", t).numpy(), teacher.numpy()).statistic)
            for seed in results.base.seeds
        ]
        for arm in ("distilled", "baseline")
    )
    statements = [
        within("similar classes of the teacher are similar for a student that never saw it (rank correlation)",
               baseline, 0.3, 1.0),
        _rise("the distilled student's order of pairs is closer to the teacher's (rank correlation)",
              distilled, baseline),
    ]  # fmt: skip
    names = results.summary("kd").get("classes") or [str(i) for i in range(10)]
    i, j = torch.triu_indices(len(names), len(names), 1).unbind()
    pairs = [f"{names[int(i[k])]} and {names[int(j[k])]}" for k in teacher.argsort(descending=True)[:3]]
    series = {"rank correlation with the teacher": [point("baseline", baseline), point("distilled", distilled)]}
    plot = ExperimentPlot("", "Spearman's rank correlation", series,
                          caption="Each student's order of the pairs of classes against the teacher's.")  # fmt: skip
    note = f"sim(i, j) = E[p_i p_j] at T = {t} on the test split. Most similar for the teacher: {'; '.join(pairs)}."
    return ExperimentResult(statements, [plot], [note])


def _rise(statement: str, treated: Sequence[float], control: Sequence[float], unit: str = "") -> StatementResult:
    """A claimed rise of a metric other than accuracy."""
    rule = "reproduced above 0; not reproduced below"
    return replace(gain(statement, treated, control, relevant=0.0), unit=unit, rule=rule)


def _features(name: str, label: str) -> Callable[[Results], ExperimentResult]:
    def test(results: Results) -> ExperimentResult:
        arms = {
            "baseline": ("kd", "baseline"), f"{label} only": (name, "distilled"),
            "soft labels only": ("kd", "distilled"), "both": (f"{name}-kd", "distilled"),
        }  # fmt: skip
        statements = [
            (f"matching {label} helps in addition to hard labels", f"{label} only", "baseline"),
            (f"matching {label} helps in addition to soft labels", "both", "soft labels only"),
        ]
        return _compare(results, arms, statements)

    return test


def self_distillation(results: Results) -> ExperimentResult:
    """Generations 0 to 3 of one architecture, and their ensemble."""
    arms = {f"generation {n}": ("born-again", f"generation {n}") for n in range(4)}
    arms["ensemble of all"] = ("born-again", "ensemble of 0 to 3")
    statements = [
        (f"generation {n} is better than generation {n - 1}", f"generation {n}", f"generation {n - 1}")
        for n in (1, 2, 3)
    ]
    result = _compare(results, arms, statements)
    best = {name: result.accuracies[name]["best"] for name in ("ensemble of all", "generation 3")}
    over = gain("", best["ensemble of all"], best["generation 3"])
    bounds = "" if over.low is None or over.high is None else f" ({100 * over.low:+.2f} to {100 * over.high:+.2f})"
    notes = [
        "The rule of thumb is 1 to 2 points for the first generation; measured "
        f"{100 * result.statements[0].mean:+.2f}.",
        f"The ensemble against generation 3, both with the weights best on validation: {100 * over.mean:+.2f} "
        f"points{bounds}.",
    ]
    return replace(result, notes=notes)


def capacity_gap(results: Results) -> ExperimentResult:
    """The gain over the ratio of the student's to the teacher's parameters."""
    ratio = {arm: float(results.summary(arm)["capacity_ratio"]) for arm in ("kd", *SIZES)}
    arms = sorted(ratio, key=ratio.__getitem__)
    distilled = {arm: results.accuracy(arm) for arm in arms}
    baseline = {arm: results.accuracy(arm, "baseline") for arm in arms}
    gains = {arm: [a - b for a, b in zip(distilled[arm], baseline[arm], strict=True)] for arm in arms}
    teacher = results.summary("kd")["teacher"]["accuracy"]

    def mean(which: Sequence[str]) -> list[float]:
        return [sum(values) / len(values) for values in zip(*(gains[arm] for arm in which), strict=True)]

    large, small = mean([a for a in arms if ratio[a] > 0.1]), mean([a for a in arms if ratio[a] < 0.01])
    statements = [
        gain("above r = 0.1 distillation helps (mean gain of such students)", large, [0.0] * len(large)),
        gain("above r = 0.1 it helps more than below r = 0.01", large, small),
    ]
    x = "student's parameters over teacher's"
    accuracies = {
        "distilled": [point(ratio[a], distilled[a]) for a in arms],
        "baseline": [point(ratio[a], baseline[a]) for a in arms],
        "teacher": [PlotPoint(ratio[a], teacher) for a in (arms[0], arms[-1])],
    }
    plots = [
        ExperimentPlot(x, "gain over the baseline student", {"gain": [point(ratio[a], gains[a]) for a in arms]},
                       log_x=True, percent=True, caption="Gain of distillation over the capacity ratio."),
        ExperimentPlot(x, "test accuracy", accuracies, log_x=True, percent=True,
                       caption="Accuracy over the capacity ratio."),
    ]  # fmt: skip
    shares = ", ".join(f"{statistics.fmean(distilled[a]) / teacher:.1%} at r = {ratio[a]:.4f}" for a in arms)
    note = f"Share of the teacher's accuracy that the distilled student keeps: {shares}."
    by_ratio = {f"{which}, r = {ratio[a]:.4f}": (a, which) for a in arms for which in ("baseline", "distilled")}
    return ExperimentResult(statements, plots, [note], _accuracies(results, by_ratio))


def assistant(results: Results) -> ExperimentResult:
    """Distillation through assistants against that from the teacher, for a student below a hundredth of its size."""
    rows = results.summary("assistant")["rows"]
    names = {row["role"]: row["name"] for row in rows}
    baseline, direct, through = (names[role] for role in ("baseline", "direct", "distilled"))
    statement = "a student far smaller than its teacher learns more through an assistant"
    arms = {name: ("assistant", name) for name in (baseline, direct, through)}
    result = _compare(results, arms, [(statement, through, direct)])
    sizes = [f"{r['name']} {r['parameters']:,}" for r in rows if r["role"] in ("teacher", "assistant", "direct")]
    return replace(result, notes=[f"Parameters: {', '.join(sizes)}."])


def augmentation(results: Results) -> ExperimentResult:
    """Four cells: with and without soft labels and augmentation; the teacher sees the student's view."""
    arms = {
        "neither": ("kd", "baseline"), "augmentation": ("augmented", "baseline"), "soft labels": ("kd", "distilled"),
        "both": ("augmented", "distilled"),
    }  # fmt: skip
    statements = [(f"both are better than {other} only", "both", other) for other in ("soft labels", "augmentation")]
    return _compare(results, arms, statements)


def distilbert(results: Results) -> ExperimentResult:
    """The triple loss and every other layer of the teacher, against the loss without each term, and other weights."""
    arms = {
        "all three, every other layer": "triple", "without masked words": "no-mlm", "without soft labels": "no-kd",
        "without hidden states": "no-cosine", "from the first layers": "first-layers",
        "from random weights": "random-weights",
    }  # fmt: skip
    accuracies = _accuracies(results, {label: (arm, "distilled") for label, arm in arms.items()})
    accuracies |= _accuracies(results, {"masked words only": ("triple", "baseline")})
    full, *others = (values["last"] for values in accuracies.values())
    summary = results.summary("triple")
    teacher, sizes = summary["teacher"]["accuracy"], summary["parameters"]
    texts = [
        "the loss of masked words helps", "soft labels help", "hidden states help",
        "every other layer is a better initialisation than the first layers", "and than random weights",
        "the three together help compared with masked words only",
    ]  # fmt: skip
    statements = [
        within("the student keeps 97 % of the teacher's accuracy", [x / teacher for x in full], 0.97, math.inf),
        *(gain(text, full, other) for text, other in zip(texts, others, strict=True)),
    ]
    held_out = ", ".join(
        f"{label} {statistics.fmean(results.accuracy(arm, key='loss')):.3f}" for label, arm in arms.items()
    )
    notes = [
        f"Accuracy is of masked words in held-out texts; that of the teacher is {teacher:.1%}. The student has "
        f"{sizes['student']:,} of {sizes['teacher']:,} parameters, {sizes['student'] / sizes['teacher']:.0%}. (Half "
        "the layers of BERT leave 60 %, since its embeddings are a smaller part.)",
        f"Loss (nats): {held_out}.",
    ]
    return ExperimentResult(statements, [_bars(accuracies)], notes, accuracies)


def closed_teacher(results: Results) -> ExperimentResult:
    """Loss of a closed teacher's held-out answers before training, after it, and after training on shuffled ones."""
    held_out = {
        "before training": results.untrained("closed"),
        "trained on its answers": results.accuracy("closed", key="loss"),
        "trained on its answers to other prompts": results.accuracy("closed-shuffled", key="loss"),
    }
    before, own, other = held_out.values()
    statements = [
        _rise("training on a teacher's answers lowers the loss of its held-out answers", before, own, "nats a token"),
        _rise("it lowers the loss more than training on the same answers, each to another prompt", other, own,
              "nats a token"),
    ]  # fmt: skip
    series = {"held-out loss": [point(label, values) for label, values in held_out.items()]}
    plot = ExperimentPlot("", "loss of held-out answers, nats a token", series,
                          caption="Loss of the teacher's held-out answers.")  # fmt: skip
    counts, size = llm.read_counts(results.out), results.summary("closed")["parameters"]["student"]
    note = (
        f"{counts['pairs']:,} conversations for training and {counts['held']:,} held out. The student has {size:,} "
        "parameters, its own tokenizer, and nothing of the teacher but its texts. Both trainings use the same "
        "prompts and the same answers in as many steps; they differ only in which answer follows which prompt. The "
        "quality of the answers is another question; tutelage judge measures it."
    )
    arms = {"its answers": ("closed", "distilled"), "shuffled": ("closed-shuffled", "distilled")}
    return ExperimentResult(statements, [plot], [note], _accuracies(results, arms))


HINTON = "Hinton, Vinyals and Dean (2015)"
MIRZADEH = "Mirzadeh et al. (2020)"

CLAIMS: dict[str, Claim] = {
    "soft-labels": Claim(
        "A student learns more from the teacher's soft labels than from hard labels.",
        HINTON, "Baseline and distilled student: same images, steps, initial weights and order.", ["kd"], soft_labels,
    ),
    "temperature": Claim(
        "T = 4 to 8 works; T = 1 transfers little and T = 20 loses discrimination. T to infinity gives the uniform "
        "distribution, T to 0 the largest logit.",
        "a rule of thumb, no paper; the limits are those of the softmax",
        "Distilled at T = 1, 2, 4, 8, 20; the limits on the teacher's logits.",
        ["kd", "T1", "T2", "T8", "T20"], temperature,
    ),
    "t-squared": Claim(
        "Gradients of the soft loss shrink as 1/T^2, and the factor T^2 compensates this.",
        HINTON, "Norm of the gradient by the logits of baseline students, on validation images.", ["kd"], t_squared,
    ),
    "gradient": Claim(
        "The gradient of the soft loss by a logit is (p_S - p_T) / T.",
        HINTON, "Autograd against the closed form in float64, on validation images.", ["kd"], gradient,
    ),
    "dark-knowledge": Claim(
        "Soft labels contain the similarity of classes, sim(i, j) = E[p_i p_j], and the student learns it.",
        f"{HINTON}; no paper for the measure",
        "Order of the pairs of classes by sim: teacher against distilled and baseline students.", ["kd"],
        dark_knowledge,
    ),
    "fitnets": Claim(
        "Matching the teacher's intermediate features (hints) helps the student.",
        "Romero et al. (2015)",
        "Hints in addition to hard labels, and to hard and soft labels, against the same without hints.",
        ["kd", "hint", "hint-kd"], _features("hint", "hints"),
    ),
    "attention-transfer": Claim(
        "Matching the teacher's attention maps helps the student.",
        "Zagoruyko and Komodakis (2017)",
        "Attention maps in addition to hard labels, and to hard and soft labels, against the same without the maps.",
        ["kd", "attention", "attention-kd"], _features("attention", "attention"),
    ),
    "self-distillation": Claim(
        "A student with its teacher's architecture does better than the teacher, by 1 to 2 points, and the next "
        "generation better again.",
        "Furlanello et al. (2018); the size of the gain is a rule of thumb",
        "Generations 0 to 3; each starts from its own weights and is distilled from the one before.", ["born-again"],
        self_distillation,
    ),
    "capacity-gap": Claim(
        "A student above a tenth of its teacher's size learns well from it; below a hundredth there is a gap.",
        f"{MIRZADEH}; the two sizes are a rule of thumb",
        "Gain of distillation for students over nearly three decades of size.", ["kd", *SIZES], capacity_gap,
    ),
    "assistant": Claim(
        "Where the gap is large, a teacher assistant of intermediate size bridges it.",
        MIRZADEH, "The smallest student, distilled from the teacher and through assistants.", ["assistant"],
        assistant,
    ),
    "augmentation": Claim(
        "Soft labels together with augmentation are best.",
        "Beyer et al. (2022)", "Four cells: neither, either, both; the teacher sees the view that the student sees.",
        ["kd", "augmented"], augmentation,
    ),
    "distilbert": Claim(
        "DistilBERT: a student with every other layer of an encoder keeps 97 % of its performance by three losses: "
        "masked words, soft labels and hidden states.",
        "Sanh et al. (2019)",
        "Masked words of held-out texts; each loss left out once, and two other initialisations.",
        ["triple", *TRIPLE], distilbert,
    ),
    "llm": Claim(
        "Alpaca: a student that has only the answers of a closed teacher learns to answer as it does.",
        "Taori et al. (2023)",
        "Loss of held-out answers: before training, after training on the teacher's answers, and after training on "
        "the same answers shuffled among the prompts.",
        ["closed", "closed-shuffled"], closed_teacher,
    ),
}  # fmt: skip
"""Every experiment, by its id."""
