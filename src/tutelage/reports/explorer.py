"""The part of the page on single samples: where teacher and student disagree, and what T makes of what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tutelage.reports.dark import class_names, temperature
from tutelage.reports.parts import table
from tutelage.reports.read import Run
from tutelage.reports.wording import called, count, escaped, percent

COLDEST, HOTTEST = 0.25, 20.0
"""Ends of the slider. It moves by the logarithm of T."""
STEPS = 100
TITLE = 60
"""Characters of a text on its card."""

NOTE = (
    "Pick a sample and move T. The distributions are softmax(logits / T): at T = 1 what a model says, above it what "
    "else it finds likely shows, which is what a student is taught by; below it only the likeliest class is left. "
    "Classes are in the teacher's order, which T does not change."
)
NOTE_UNTAUGHT = NOTE.replace("the teacher's order", "the order of the first model")


def samples(runs: Sequence[Run], data: list[dict[str, Any]]) -> str:
    """The section; empty where no run kept samples. ``data`` takes what the page's script draws."""
    parts = [_of_run(run, data, heading=len(runs) > 1) for run in runs if run.samples is not None]
    shown = "".join(parts)
    return f"<section><h2>Sample by sample</h2>{shown}</section>" if shown else ""


def _of_run(run: Run, data: list[dict[str, Any]], heading: bool) -> str:
    found = run.samples
    assert found is not None
    names = class_names(run, len(found["by_class"]["n"]))
    who = called(run.summary)
    title = f"<h3>{escaped(run.label)}</h3>" if heading else ""
    if not found["samples"]:
        return f"{title}<p class='finding'>{escaped(finding(found, who))}</p>"
    taught = temperature(run)
    order = [name for name in ("teacher", "baseline", "distilled") if name in found["samples"][0]["logits"]]
    data.append(
        {
            "names": names, "models": order, "called": [who[name] for name in order], "reference": found["reference"],
            "student": found["student"],
            "samples": [
                {"label": one["label"], "logits": [one["logits"][name] for name in order]} for one in found["samples"]
            ],
        }
    )  # fmt: skip
    number = len(data) - 1
    cards = "".join(_card(i, number, one, found, names, who) for i, one in enumerate(found["samples"]))
    note = NOTE if found["reference"] == "teacher" else NOTE_UNTAUGHT
    return (
        f"{title}<p class='finding'>{escaped(finding(found, who))}</p>{_confused(found, names, who)}"
        f"<form class='panel explorer' data-explorer='{number}'>"
        f"<p class='note'>{escaped(note)}</p>"
        f"<div class='pick'><fieldset class='cards' tabindex='-1'><legend>Sample</legend>{cards}</fieldset>"
        f"<div class='shown'><div class='sample'></div>{_slider(taught, number)}"
        f"<div class='scroll' tabindex='0' role='region' aria-label='Distributions of the sample'>"
        f"<table class='soft'><caption class='hidden'>What each model says of the sample, class by class</caption>"
        f"<thead></thead><tbody></tbody></table></div><p class='note entropy' role='status'></p></div></div></form>"
    )


def _slider(taught: float, number: int) -> str:
    place = round(STEPS * math.log(min(max(taught, COLDEST), HOTTEST) / COLDEST) / math.log(HOTTEST / COLDEST))
    return (
        f"<div class='temperature'><label for='T{number}'>T</label>"
        f"<input type='range' id='T{number}' name='T' min='0' max='{STEPS}' "
        f"value='{place}' data-low='{COLDEST}' data-high='{HOTTEST}' data-taught='{taught:g}' "
        f"aria-label='Temperature'><output for='T{number}'></output>"
        f"<button type='button' data-set='1'>T = 1</button>"
        f"<button type='button' data-set='{taught:g}'>as taught, T = {taught:g}</button></div>"
    )


def _card(
    i: int,
    number: int,
    one: Mapping[str, Any],
    found: Mapping[str, Any],
    names: Sequence[str],
    who: Mapping[str, str],
) -> str:
    """A sample to pick: what it is and what the two say of it."""
    said = {name: _top(one["logits"][name]) for name in (found["reference"], found["student"])}
    apart = len({k for k, _ in said.values()}) > 1
    lines = "".join(
        f"<span><span class='swatch {name}'></span>{escaped(names[k])} {escaped(percent(p))}"
        f"{_mark(k, one['label'])}</span>"
        for name, (k, p) in said.items()
    )
    label = "no label" if one["label"] is None else names[one["label"]]
    text = one["text"] or ""
    shown = f"<img src='{escaped(one['image'])}' alt='' width='56' height='56'>" if one["image"] else ""
    cut = text if len(text) <= TITLE else text[: TITLE - 1] + "…"
    head = f"<q>{escaped(cut, breaking=True)}</q>" if text else ""
    aria = f"sample {one['row']}, {'disagree' if apart else 'agree'}"
    whole = f" data-text='{escaped(text, breaking=True)}'" if text else ""
    return (
        f"<label class='card{' apart' if apart else ''}'><input type='radio' name='sample{number}' value='{i}'"
        f"{' checked' if i == 0 else ''} aria-label='{escaped(aria)}'>{shown}<span class='lines'{whole}>{head}"
        f"<b>{escaped(label)}</b>{lines}</span></label>"
    )


def _mark(said: int, label: int | None) -> str:
    if label is None:
        return ""
    return " <span class='right'>right</span>" if said == label else " <span class='wrong'>wrong</span>"


def _top(logits: Sequence[float]) -> tuple[int, float]:
    """The likeliest class and its probability."""
    k = max(range(len(logits)), key=logits.__getitem__)
    return k, 1 / math.fsum(math.exp(z - logits[k]) for z in logits)


def finding(found: Mapping[str, Any], who: Mapping[str, str]) -> str:
    """How often the two disagree, and who is right then."""
    first, second = who[found["reference"]], who[found["student"]]
    n, right = found["n"], found["right"]
    apart = n - found["agree"][found["student"]]
    text = f"The {first} and the {second} ({found['exported']}) disagree on {count(apart)} of {count(n)} test samples"
    text += f", {percent(apart / n)}." if n else "."
    if not apart:
        return text
    text += (
        f" The {first} alone is right on {count(right['reference'])}, the {second} alone on "
        f"{count(right['student'])}; both are right on {count(right['both'])}, neither on {count(right['neither'])}."
    )
    alone = found["agree"].get("baseline")
    if alone is not None and found["reference"] == "teacher":
        text += f" The {who['baseline']} disagrees with the teacher on {count(n - alone)}."
    return text


def _confused(found: Mapping[str, Any], names: Sequence[str], who: Mapping[str, str]) -> str:
    """The most frequent disagreements."""
    if not found["pairs"]:
        return ""
    rows = [[escaped(names[i]), escaped(names[j]), escaped(count(n))] for i, j, n in found["pairs"][:8]]
    columns = [f"The {who[found['reference']]} says", f"the {who[found['student']]} says", "Samples"]
    return table("Where they disagree most often", columns, rows, "narrow words")
