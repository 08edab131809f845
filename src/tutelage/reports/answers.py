"""The parts of the page on what models write: texts side by side, and what a judge said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tutelage.reports.parts import table
from tutelage.reports.read import Run
from tutelage.reports.wording import ABSENT, called, escaped, percent, plain

LONGEST = 2_000
"""Characters of a text that are shown."""

IN_VIEW = 4
"""So many prompts stand open; the rest unfolds."""

NOTE = (
    "Texts of the test split, from all over it, and how each model goes on: the likeliest token each time, at most "
    "{} tokens. One answer shows how a model writes and not how well: that is what the figures above are for."
)

NOTE_JUDGED = (
    "{prompts} prompts that nobody trained on. {judge} was shown the two answers of each pair in both orders: a side "
    "wins where it is preferred in both, or in one and ties in the other. The rate counts a tie as half; its "
    "interval is of 95 %, over prompts. A judge that contradicts itself, or often takes what comes first, says "
    "little."
)

WORDS = {
    "win/win": "{a} preferred in both orders", "loss/loss": "{b} preferred in both orders",
    "tie/win": "{a} preferred in one order, a tie in the other",
    "loss/tie": "{b} preferred in one order, a tie in the other", "tie/tie": "a tie in both orders",
    "loss/win": "a tie: the judge contradicted itself",
}  # fmt: skip
"""By what was said of the first of a pair in the two orders, in the order of letters."""


def written(runs: Sequence[Run]) -> str:
    """What the models of each run write; empty where none did."""
    parts = []
    for run in runs:
        found = run.written
        if found is None:
            continue
        names = called(run.summary)
        columns = [(name, names.get(name, name), name) for name in found["models"]]
        asked = [
            _asked(i, text["prompt"], [*((role, name, text[key], "") for role, name, key in columns),
                                       ("other", "in the data", text["data"], "")], [])
            for i, text in enumerate(found["texts"], 1)
        ]  # fmt: skip
        title = f"<h3>{escaped(run.label)}</h3>" if len(runs) > 1 else ""
        note = f"<p class='note'>{escaped(NOTE.format(found['tokens']))} The student is {escaped(found['exported'])}."
        parts.append(f"{title}{note}</p>{_listed(asked)}")
    return f"<section><h2>What they write</h2>{''.join(parts)}</section>" if parts else ""


def judged(runs: Sequence[Run]) -> str:
    """What judges said of the students of each run; empty where there was none."""
    parts = [judgement(found, run.label if len(runs) > 1 else "") for run in runs for found in run.judged]
    return "".join(parts)


def judgement(found: Mapping[str, Any], label: str = "", heading: str = "h2") -> str:
    """One judgement: the figures, and answers side by side."""
    title = "Answers before a judge" + (f": {label}" if label else "")
    note = NOTE_JUDGED.format(prompts=f"{found['prompts']:,}", judge=found["judge"])
    columns = ["First", "Second", "Rate of wins", "Won", "Tied", "Lost", "Contradicted itself",
               "Preferred what came first", "Without verdict"]  # fmt: skip
    rows = [
        [escaped(x) for x in (
            *one["pair"], _rate(one), one["wins"], one["ties"], one["losses"], one["opposed"],
            ABSENT if one["first_place"] is None else f"{one['first_place']:.0%}".replace("%", " %"),
            one["without_verdict"],
        )]
        for one in found["pairs"]
    ]  # fmt: skip
    shown = table(f"Pairs of answers, judged by {found['judge']}", columns, rows)
    if found["held_out_loss"]:
        losses = [[escaped(name), escaped(plain(loss))] for name, loss in found["held_out_loss"].items()]
        shown += table(
            "How well each foresees the teacher's answers", ["Model", "Loss, nats a token"], losses, "narrow"
        )
    roles, pairs = found["roles"], {" / ".join(one["pair"]): one["pair"] for one in found["pairs"]}
    asked = []
    for i, one in enumerate(found["samples"], 1):
        verdicts = [(pairs[name], orders) for name, orders in one["verdicts"].items() if name in pairs]
        answers = [
            (roles.get(name, "baseline"), name, text, "preferred" if _preferred(name, verdicts) else "")
            for name, text in one["answers"].items()
        ]
        said = [verdict_words(pair, orders) for pair, orders in verdicts]
        asked.append(_asked(i, _thread(one["messages"]), answers, said))
    return (
        f"<section><{heading}>{escaped(title)}</{heading}><p class='note'>{escaped(note)}</p>{shown}"
        f"<h3>Answers side by side</h3>{_listed(asked)}</section>"
    )


def _rate(one: Mapping[str, Any]) -> str:
    if one["rate"] is None:
        return ABSENT
    held = "" if one["low"] is None else f" ({percent(one['low'])} to {percent(one['high'])})"
    return percent(one["rate"]) + held


def verdict_words(pair: Sequence[str], orders: Sequence[str | None]) -> str:
    """What a judge said of a pair in both orders, as a sentence."""
    a, b = pair
    if len(orders) != 2 or None in orders:
        return f"{a} and {b}: no verdict"
    said = WORDS["/".join(sorted(map(str, orders)))]
    return f"{a} and {b}: {said.format(a=a, b=b)}"


def _preferred(name: str, verdicts: Sequence[tuple[Sequence[str], Sequence[str | None]]]) -> bool:
    """Whether a side was preferred in both orders to every other that it was compared with."""
    mine = [("win" if pair[0] == name else "loss", orders) for pair, orders in verdicts if name in pair]
    return bool(mine) and all(list(orders) == [wanted] * 2 for wanted, orders in mine)


def _thread(messages: Sequence[Mapping[str, str]]) -> str:
    if len(messages) == 1:
        return messages[0].get("content", "")
    return "\n\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in messages)


def _asked(number: int, prompt: str, answers: Sequence[tuple[str, str, str, str]], verdicts: Sequence[str]) -> str:
    """A prompt with its answers: role (for the colour), name, text, and a word on it."""
    cells = "".join(
        f"<div><h4><span class='swatch {escaped(role)}'></span>{escaped(name)}"
        f"{f' <span class=won>{escaped(word)}</span>' if word else ''}</h4>{_text(text)}</div>"
        for role, name, text, word in answers
    )
    said = "".join(f"<li>{escaped(line)}</li>" for line in verdicts)
    return (
        f"<article class='asked panel' aria-label='Prompt {number}'>{_text(prompt, 'prompt')}"
        f"<div class='answers'>{cells}</div>{f'<ul class=note>{said}</ul>' if said else ''}</article>"
    )


def _text(text: str, kind: str = "said") -> str:
    if not text.strip():
        return f"<p class='{kind} note'>(nothing)</p>"
    cut = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return f"<p class='{kind}'>{escaped(cut, breaking=True)}</p>"


def _listed(asked: Sequence[str]) -> str:
    rest = asked[IN_VIEW:]
    more = f"<details><summary>{len(rest)} more</summary>{''.join(rest)}</details>" if rest else ""
    return "".join(asked[:IN_VIEW]) + more
