"""The lecture's claims, each with its arms and its judgement."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tutelage import losses
from tutelage.lab import llm
from tutelage.lab.arms import SIZES, TRIPLE, Results
from tutelage.lab.judge import Figure, Finding, Part, Point, exact, gain, point, within

TEMPERATURES = (1, 2, 4, 8, 20)


@dataclass(frozen=True)
class Claim:
    """An experiment.

    Attributes:
        claim: what the lecture says.
        design: what is compared with what.
        arms: names of :data:`~tutelage.lab.arms.ARMS` that it reads.
        judge: reads them.
    """

    claim: str
    design: str
    arms: Sequence[str]
    judge: Callable[[Results], Finding]


def _arms(results: Results, named: dict[str, tuple[str, str]]) -> dict[str, dict[str, list[float]]]:
    """Test accuracy by label, of a run's arm (``baseline``, ``distilled``) or a workflow's row, for best and last."""

    def values(arm: str, which: str, weights: str) -> list[float]:
        read = results.accuracy if "students" in results.summary(arm) else results.row
        return read(arm, which, weights)

    return {
        label: {weights: values(arm, which, weights) for weights in ("last", "best")}
        for label, (arm, which) in named.items()
    }


def _bars(found: dict[str, dict[str, list[float]]]) -> Figure:
    """Test accuracy of each arm."""
    series = {
        name: [point(label, values[weights]) for label, values in found.items()]
        for name, weights in (("last epoch", "last"), ("best on validation", "best"))
    }
    return Figure("", "test accuracy", series, percent=True, says="Test accuracy of each arm, mean and interval.")


def _compared(results: Results, named: dict[str, tuple[str, str]], parts: Sequence[tuple[str, str, str]]) -> Finding:
    """Arms side by side, and gains of one over another by their labels, of the last epoch."""
    found = _arms(results, named)
    judged = [gain(says, found[a]["last"], found[b]["last"]) for says, a, b in parts]
    return Finding(judged, [_bars(found)], figures_by_arm=found)


def soft_labels(results: Results) -> Finding:
    """A student with soft labels against the same student without."""
    named = {"baseline": ("kd", "baseline"), "distilled": ("kd", "distilled")}
    return _compared(results, named, [("soft labels raise the student's accuracy", "distilled", "baseline")])


def temperature(results: Results) -> Finding:
    """Accuracy over T; the best of 4 and 8 is chosen on validation."""
    arms = {t: "kd" if t == 4 else f"T{t}" for t in TEMPERATURES}
    found = _arms(results, {f"T={t}": (arm, "distilled") for t, arm in arms.items()})
    middle = max((4, 8), key=lambda t: results.validation(arms[t]))
    logits = results.logits("teacher")
    hot = (torch.softmax(logits / 1e6, -1) - 1 / logits.shape[-1]).abs().max()
    largest = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])
    top = logits.topk(2).values
    clear = (top[:, 0] - top[:, 1]) > 1e-3
    cold = (torch.softmax(logits[clear] / 1e-5, -1) - largest[clear]).abs().max()
    parts = [
        gain(f"T={middle} (chosen of 4 and 8 on validation) is better than T=1", found[f"T={middle}"]["last"],
             found["T=1"]["last"]),
        gain(f"T={middle} is better than T=20", found[f"T={middle}"]["last"], found["T=20"]["last"]),
        exact("T to infinity gives the uniform distribution (T = 1e6)", float(hot), 1e-4),
        exact("T to 0 gives the largest logit alone (T = 1e-5)", float(cold), 1e-9),
    ]  # fmt: skip
    series = {
        name: [point(t, found[f"T={t}"][weights]) for t in TEMPERATURES]
        for name, weights in (("last epoch", "last"), ("best on validation", "best"))
    }
    drawn = Figure("temperature", "test accuracy", series, log_x=True, percent=True, says="Test accuracy over T.")
    return Finding(parts, [drawn], figures_by_arm=found)


def _soft_gradient(student: Tensor, teacher: Tensor, t: float, *, squared: bool) -> Tensor:
    """Of the soft loss by the student's logits, row by row, with or without the factor T^2."""
    x = student.clone().requires_grad_()
    loss = losses.kd(x, teacher, temperature=t, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)
    return grad if squared else grad / t**2


def t_squared(results: Results) -> Finding:
    """Norm of the gradient over T, on the validation split, of students that were trained alone."""
    teacher = results.logits("teacher")
    ts = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
    norms: dict[bool, list[list[float]]] = {True: [], False: []}
    for seed in results.base.seeds:
        student = results.logits(f"baseline-seed{seed}")
        for squared in norms:
            norms[squared].append(
                [float(_soft_gradient(student, teacher, t, squared=squared).norm(dim=-1).mean()) for t in ts]
            )

    def slopes(curves: list[list[float]], first: int) -> list[float]:
        return [_slope([math.log(t) for t in ts[first:]], [math.log(v) for v in c[first:]]) for c in curves]

    parts = [
        within("without the factor, the gradient falls as 1/T^2 (slope on log-log, T from 16 up)",
               slopes(norms[False], 4), -2.1, -1.9),
        within("with the factor it does not depend on T (slope, T from 16 up)", slopes(norms[True], 4), -0.1, 0.1),
    ]  # fmt: skip
    used = [_slope([math.log(t) for t in ts[1:4]], [math.log(v) for v in c[1:4]]) for c in norms[False]]
    series = {
        name: [point(t, [c[i] for c in norms[squared]]) for i, t in enumerate(ts)]
        for name, squared in (("without the factor", False), ("with T^2", True))
    }
    drawn = Figure("temperature", "mean norm of the gradient", series, log_x=True, log_y=True,
                   says="Norm of the gradient of the soft loss by the student's logits, over T.")  # fmt: skip
    note = (
        f"Over the T that are used, 2 to 8, the slope without the factor is {sum(used) / len(used):.2f}: the law "
        "is one of large T, where the logits over T are small."
    )
    return Finding(parts, [drawn], [note])


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def gradient(results: Results) -> Finding:
    """Autograd against the closed form, on real logits."""
    teacher = results.logits("teacher")
    points: list[Point] = []
    worst = 0.0
    for t in (0.5, 1.0, 2.0, 4.0, 8.0, 20.0):
        errors = []
        for seed in results.base.seeds:
            student = results.logits(f"baseline-seed{seed}")
            closed = (torch.softmax(student / t, -1) - torch.softmax(teacher / t, -1)) / t
            found = _soft_gradient(student, teacher, t, squared=False)
            errors.append(float((closed - found).abs().max()))
        worst = max(worst, *errors)
        points.append(Point(t, max(errors)))
    part = exact("dL/dz = (p_S - p_T) / T, largest error over validation images, classes, seeds and T", worst, 1e-12)
    note = "L is KL(p_T || p_S) at T without the factor T^2; with it, the gradient is T (p_S - p_T)."
    drawn = Figure("temperature", "largest error", {"autograd against closed form": points}, log_x=True, log_y=True,
                   says="Largest difference between autograd and the closed form, over T.")  # fmt: skip
    return Finding([part], [drawn], [note])


def _ranks(x: Tensor) -> Tensor:
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(x.numpy()))


def _spearman(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def dark_knowledge(results: Results) -> Finding:
    """Whether classes that the teacher finds alike are alike to students, taught and not."""
    t = 4
    teacher = results.similarity("teacher", t)
    taught, alone = (
        [_spearman(results.similarity(f"{arm}-seed{seed}", t), teacher) for seed in results.base.seeds]
        for arm in ("distilled", "baseline")
    )
    parts = [
        within("classes that the teacher finds alike are alike to a student that never saw it (rank correlation)",
               alone, 0.3, 1.0),
        _more("the taught student's order of pairs is nearer to the teacher's (rank correlation)", taught, alone),
    ]  # fmt: skip
    names = results.summary("kd").get("classes") or [str(i) for i in range(10)]
    i, j = torch.triu_indices(len(names), len(names), 1).unbind()
    alike = [f"{names[int(i[k])]} and {names[int(j[k])]}" for k in teacher.argsort(descending=True)[:3]]
    series = {"rank correlation with the teacher": [point("baseline", alone), point("distilled", taught)]}
    drawn = Figure("", "Spearman's rank correlation", series, says="How near each student's order of the pairs of "
                   "classes is to the teacher's.")  # fmt: skip
    note = f"sim(i, j) = E[p_i p_j] at T = {t} on the test split. Most alike to the teacher: {'; '.join(alike)}."
    return Finding(parts, [drawn], [note])


def _more(says: str, treated: Sequence[float], control: Sequence[float], unit: str = "") -> Part:
    """A claimed rise of something that is not an accuracy."""
    part = gain(says, treated, control, worth=0.0)
    return Part(**{**part.__dict__, "unit": unit, "rule": "reproduced above 0; not reproduced below"})


def _features(name: str, word: str) -> Callable[[Results], Finding]:
    def judge(results: Results) -> Finding:
        named = {
            "baseline": ("kd", "baseline"), f"{word} only": (name, "distilled"),
            "soft labels only": ("kd", "distilled"),
            "both": (f"{name}-kd", "distilled"),
        }  # fmt: skip
        parts = [
            (f"matching {word} helps beside hard labels", f"{word} only", "baseline"),
            (f"matching {word} helps beside soft labels", "both", "soft labels only"),
        ]
        return _compared(results, named, parts)

    return judge


def self_distillation(results: Results) -> Finding:
    """Generations 0 to 3 of one architecture, and their ensemble."""
    rows = {f"generation {n}": ("born-again", f"generation {n}") for n in range(4)}
    together = {"ensemble of all": ("born-again", "ensemble of 0 to 3")}
    parts = [("generation 1 is better than generation 0", "generation 1", "generation 0")]
    parts += [
        (f"generation {n} is better than generation {n - 1}", f"generation {n}", f"generation {n - 1}")
        for n in (2, 3)
    ]
    found = _compared(results, {**rows, **together}, parts)
    first = found.parts[0]
    over = gain("", found.figures_by_arm["ensemble of all"]["best"], found.figures_by_arm["generation 3"]["best"])
    notes = [
        f"The lecture says 1 to 2 points for the first generation; measured {100 * first.mean:+.2f}.",
        f"The ensemble against generation 3, both with the weights best on validation: {_points(over)}.",
    ]
    return Finding(found.parts, found.figures, notes, found.figures_by_arm)


def _points(part: Part) -> str:
    held = "" if part.low is None or part.high is None else f" ({100 * part.low:+.2f} to {100 * part.high:+.2f})"
    return f"{100 * part.mean:+.2f} points{held}"


def capacity_gap(results: Results) -> Finding:
    """The gain over the ratio of student's to teacher's parameters."""
    arms = ["kd", *SIZES]
    ratio = {arm: float(results.summary(arm)["capacity_ratio"]) for arm in arms}
    arms.sort(key=ratio.__getitem__)
    gains = {
        arm: [a - b for a, b in zip(results.accuracy(arm), results.accuracy(arm, "baseline"), strict=True)]
        for arm in arms
    }
    teacher = results.summary("kd")["teacher"]["accuracy"]

    def mean(which: Sequence[str]) -> list[float]:
        return [sum(values) / len(values) for values in zip(*(gains[arm] for arm in which), strict=True)]

    large, small = [a for a in arms if ratio[a] > 0.1], [a for a in arms if ratio[a] < 0.01]
    zero = [0.0] * len(results.base.seeds)
    parts = [
        gain("above r = 0.1 distillation helps (mean gain of such students)", mean(large), zero),
        gain("above r = 0.1 it helps more than below r = 0.01", mean(large), mean(small)),
    ]
    drawn = [
        Figure("student's parameters over teacher's", "gain over the baseline student",
               {"gain": [point(ratio[a], gains[a]) for a in arms]}, log_x=True, percent=True,
               says="Gain of distillation over the capacity ratio."),
        Figure("student's parameters over teacher's", "test accuracy",
               {"distilled": [point(ratio[a], results.accuracy(a)) for a in arms],
                "baseline": [point(ratio[a], results.accuracy(a, "baseline")) for a in arms],
                "teacher": [Point(ratio[a], teacher) for a in (arms[0], arms[-1])]}, log_x=True, percent=True,
               says="Accuracy over the capacity ratio."),
    ]  # fmt: skip
    found = _arms(
        results, {f"{which}, r = {ratio[a]:.4f}": (a, which) for a in arms for which in ("baseline", "distilled")}
    )
    kept = ", ".join(f"{sum(results.accuracy(a)) / len(zero) / teacher:.1%} at r = {ratio[a]:.4f}" for a in arms)
    return Finding(parts, drawn, [f"Of the teacher's accuracy the distilled student keeps {kept}."], found)


def assistant(results: Results) -> Finding:
    """Through assistants against the teacher itself, for a student of under a hundredth of its size."""
    names = ["baseline student", "taught directly", "taught through assistants"]
    parts = [("a student far smaller than its teacher learns more through an assistant", names[2], names[1])]
    found = _compared(results, {name: ("assistant", name) for name in names}, parts)
    rows = {row["name"]: row["parameters"] for row in results.summary("assistant")["rows"]}
    sizes = ", ".join(
        f"{name} {size:,}" for name, size in rows.items() if name in ("teacher", names[1]) or "tant " in name
    )
    return Finding(found.parts, found.figures, [f"Parameters: {sizes}."], found.figures_by_arm)


def augmentation(results: Results) -> Finding:
    """Four cells: soft labels or not, augmentation or not; the teacher sees the student's view."""
    named = {
        "neither": ("kd", "baseline"), "augmentation": ("augmented", "baseline"), "soft labels": ("kd", "distilled"),
        "both": ("augmented", "distilled"),
    }  # fmt: skip
    parts = [(f"both are better than {other} alone", "both", other) for other in ("soft labels", "augmentation")]
    return _compared(results, named, parts)


def distilbert(results: Results) -> Finding:
    """The triple loss and the teacher's every other layer, against the loss without each part and other weights."""
    named = {
        "all three, every other layer": "triple", "without masked words": "no-mlm", "without soft labels": "no-kd",
        "without hidden states": "no-cosine", "from the first layers": "first-layers",
        "from random weights": "random-weights",
    }  # fmt: skip
    found = _arms(results, {label: (arm, "distilled") for label, arm in named.items()})
    found["masked words alone"] = {w: results.accuracy("triple", "baseline", w) for w in ("last", "best")}
    whole, *others = (values["last"] for values in found.values())
    summary = results.summary("triple")
    teacher = summary["teacher"]["accuracy"]
    parts = [within("the student keeps 97 % of the teacher's accuracy", [x / teacher for x in whole], 0.97, math.inf)]
    says = [
        "the masked words' own loss helps", "soft labels help", "hidden states help",
        "every other layer is a better beginning than the first ones", "and than random weights",
        "the three together help over masked words alone",
    ]  # fmt: skip
    parts += [gain(text, whole, other) for text, other in zip(says, others, strict=True)]
    sizes = summary["parameters"]
    held_out = ", ".join(
        f"{label} {statistics.fmean(results.accuracy(arm, key='loss')):.3f}" for label, arm in named.items()
    )
    notes = [
        f"Accuracy is of masked words of texts that nobody trained on; the teacher's is {teacher:.1%}. The student "
        f"has {sizes['student']:,} of {sizes['teacher']:,} parameters, {sizes['student'] / sizes['teacher']:.0%}; "
        "of BERT's, whose embeddings weigh less, half the layers leave 60 %.",
        f"Loss (nats): {held_out}.",
    ]
    return Finding(parts, [_bars(found)], notes, found)


def closed_teacher(results: Results) -> Finding:
    """Loss of a closed teacher's held-out answers: before, after learning its answers, and after shuffled ones."""
    held_out = {
        "before training": results.untrained("closed"),
        "trained on its answers": results.accuracy("closed", key="loss"),
        "trained on its answers to other prompts": results.accuracy("closed-shuffled", key="loss"),
    }
    before, own, other = held_out.values()
    parts = [
        _more("training on a teacher's answers lowers the loss of held-out ones of it", before, own, "nats a token"),
        _more("it lowers it more than training on the same answers, each to another prompt", other, own,
              "nats a token"),
    ]  # fmt: skip
    series = {"held-out loss": [point(label, values) for label, values in held_out.items()]}
    drawn = Figure(
        "", "loss of held-out answers, nats a token", series, says="Loss of the teacher's held-out answers."
    )
    many = llm.known(results.out)
    size = results.summary("closed")["parameters"]["student"]
    right = _arms(results, {"its answers": ("closed", "distilled"), "shuffled": ("closed-shuffled", "distilled")})
    notes = [
        f"{many['pairs']:,} conversations to learn from and {many['held']:,} held out; the student has {size:,} "
        "parameters, a tokenizer of its own and nothing of the teacher but its text. Both trainings see the same "
        "prompts and the same answers in as many steps, so what differs is what an answer has to do with its prompt. "
        "How good the answers are is another question: tutelage judge asks it.",
    ]
    return Finding(parts, [drawn], notes, right)


CLAIMS: dict[str, Claim] = {
    "soft-labels": Claim(
        "A student learns more from the teacher's soft labels than from hard labels alone (72 to 76 % there).",
        "Baseline student and distilled: same images, steps, initial weights and order.", ["kd"], soft_labels,
    ),
    "temperature": Claim(
        "T = 4 to 8 works; T = 1 transfers little and T = 20 loses discrimination. T to infinity is uniform, T to 0 "
        "the largest logit.",
        "Distilled at T = 1, 2, 4, 8, 20; the limits on the teacher's logits.",
        ["kd", "T1", "T2", "T8", "T20"], temperature,
    ),
    "t-squared": Claim(
        "Gradients of the soft loss shrink as 1/T^2, which the factor T^2 makes up for.",
        "Norm of the gradient by the logits of students trained alone, on validation images.", ["kd"], t_squared,
    ),
    "gradient": Claim(
        "The gradient of the soft loss by a logit is (p_S - p_T) / T.",
        "Autograd against the closed form in float64, on validation images.", ["kd"], gradient,
    ),
    "dark-knowledge": Claim(
        "Soft labels hold how alike classes are, sim(i, j) = E[p_i p_j], and the student learns it.",
        "Order of the pairs of classes by sim: teacher against students taught and not.", ["kd"], dark_knowledge,
    ),
    "fitnets": Claim(
        "Matching the teacher's intermediate features (hints) helps the student.",
        "Hints beside hard labels, and beside hard and soft labels, against the same without.",
        ["kd", "hint", "hint-kd"], _features("hint", "hints"),
    ),
    "attention-transfer": Claim(
        "Matching the teacher's attention maps helps the student.",
        "Attention maps beside hard labels, and beside hard and soft labels, against the same without.",
        ["kd", "attention", "attention-kd"], _features("attention", "attention"),
    ),
    "self-distillation": Claim(
        "A student of its teacher's own architecture does better than the teacher, by 1 to 2 points, and the next "
        "generation better again.",
        "Generations 0 to 3, each taught by the last from weights of its own.", ["born-again"], self_distillation,
    ),
    "capacity-gap": Claim(
        "A student above a tenth of its teacher's size learns well from it; below a hundredth there is a gap.",
        "Gain of distillation for students over nearly three decades of size.", ["kd", *SIZES], capacity_gap,
    ),
    "assistant": Claim(
        "Where the gap is large, a teacher assistant of a size between bridges it.",
        "The smallest student taught directly, and through assistants.", ["assistant"], assistant,
    ),
    "augmentation": Claim(
        "Soft labels together with augmentation are best.",
        "Four cells: neither, either, both; the teacher sees the view that the student sees.",
        ["kd", "augmented"], augmentation,
    ),
    "distilbert": Claim(
        "DistilBERT: half of an encoder's layers, every other one, keeps 97 % of what it can, by three losses: "
        "masked words, soft labels and hidden states.",
        "Masked words of held-out texts, each loss left out once, and two other beginnings.",
        ["triple", *TRIPLE], distilbert,
    ),
    "llm": Claim(
        "Alpaca: a student that has nothing of a closed teacher but its answers learns to answer as it does.",
        "Loss of held-out answers: before training, after training on the teacher's answers, and after training on "
        "the same answers shuffled among the prompts.",
        ["closed", "closed-shuffled"], closed_teacher,
    ),
}  # fmt: skip
"""Every experiment, by its id."""
