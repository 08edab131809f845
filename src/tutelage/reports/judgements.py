"""Texts of language models side by side, and the verdicts of a judge on them."""

from collections.abc import Mapping, Sequence
from typing import Any

from tutelage.reports.results import model_names
from tutelage.reports.run_files import RunRecord

VERDICTS = {
    "win/win": "{a} preferred in both orders", "loss/loss": "{b} preferred in both orders",
    "tie/win": "{a} preferred in one order, a tie in the other",
    "loss/tie": "{b} preferred in one order, a tie in the other", "tie/tie": "a tie in both orders",
    "loss/win": "a tie: the judge contradicted itself",
}  # fmt: skip
"""By the verdicts on the first of a pair in the two orders, sorted."""


Prompts = list[dict[str, Any]]
"""For the template: ``text``, ``answers`` (role, name, text, is_preferred) and ``verdicts`` as sentences."""


def generated_prompts(run: RunRecord) -> Prompts:
    """Test texts with the continuation of each model and that in the data."""
    generations = run.generations
    assert generations is not None
    names = {model: model_names(run.summary).get(model, model) for model in generations["models"]}
    return [
        {
            "text": text["prompt"], "verdicts": [],
            "answers": [
                *({"role": model, "name": name, "text": text[model], "is_preferred": False}
                  for model, name in names.items()),
                {"role": "other", "name": "in the data", "text": text["data"], "is_preferred": False},
            ],
        }
        for text in generations["texts"]
    ]  # fmt: skip


def judged_prompts(judgement: Mapping[str, Any]) -> Prompts:
    """Prompts with their answers and the verdicts on each pair."""
    pairs = {" / ".join(pair["pair"]): pair["pair"] for pair in judgement["pairs"]}
    prompts = []
    for sample in judgement["samples"]:
        verdicts = [(pairs[name], orders) for name, orders in sample["verdicts"].items() if name in pairs]
        answers = [
            {"role": judgement["roles"].get(name, "baseline"), "name": name, "text": text,
             "is_preferred": _is_preferred(name, verdicts)}
            for name, text in sample["answers"].items()
        ]  # fmt: skip
        texts = [verdict_text(pair, orders) for pair, orders in verdicts]
        messages = [(m.get("role", ""), m.get("content", "")) for m in sample["messages"]]
        prompt = messages[0][1] if len(messages) == 1 else "\n\n".join(f"{role}: {text}" for role, text in messages)
        prompts.append({"text": prompt, "answers": answers, "verdicts": texts})
    return prompts


def verdict_text(pair: Sequence[str], orders: Sequence[str | None]) -> str:
    """The verdicts on a pair in both orders, as a sentence."""
    a, b = pair
    if len(orders) != 2 or None in orders:
        return f"{a} and {b}: no verdict"
    return f"{a} and {b}: {VERDICTS['/'.join(sorted(map(str, orders)))].format(a=a, b=b)}"


def _is_preferred(name: str, verdicts: Sequence[tuple[Sequence[str], Sequence[str | None]]]) -> bool:
    """Whether an answer was preferred in both orders to every other answer that it was compared with."""
    results = [("win" if pair[0] == name else "loss", orders) for pair, orders in verdicts if name in pair]
    return bool(results) and all(list(orders) == [expected] * 2 for expected, orders in results)
