"""From a closed teacher's answers to a student of one's own: what the three commands of the recipe found.

    python examples/smollm2.py SmolLM2-135M-Instruct
    python examples/fresh_student.py SmolLM2-135M-Instruct fresh-student
    transformers serve SmolLM2-135M-Instruct ...          # as examples/smollm2.py says
    tutelage generate recipes/alpaca-smollm2.yaml
    tutelage run recipes/alpaca-smollm2.yaml
    tutelage judge recipes/alpaca-smollm2.yaml
    python benchmarks/alpaca.py runs/alpaca-smollm2

Reads the folders that they left, and puts the figures into ``results/alpaca-smollm2.json``, and
what a person reads, with the first judged answers side by side, into ``results/alpaca-smollm2.md``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path("results")
SAMPLES = 10


def summary(folder: Path) -> dict[str, Any]:
    """What a folder's command found."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def samples(page: str) -> str:
    """The judge's page, less the answers beyond the first few."""
    head, _, rest = page.partition(f"**{SAMPLES + 1}.**")
    body = head.split("\n", 2)[2].rstrip()
    return body + ("\n\nMore are in the folder that `tutelage judge` leaves.\n" if rest else "\n")


def main() -> None:
    """Read, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    folders = {"generate": run.with_name(f"{run.name}-generate"), "judge": run.with_name(f"{run.name}-judge")}
    made, judged, learned = summary(folders["generate"]), summary(folders["judge"]), summary(run)
    student = learned["students"]["distilled"]
    figures = {
        "generate": made, "judge": judged,
        "run": {"parameters": learned["parameters"], "seeds": learned["seeds"], "best": student["best"]},
    }  # fmt: skip
    (RESULTS / "alpaca-smollm2.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in made["rejected"].items())
    losses = judged["held_out_loss"]
    text = [
        "# A student from a closed teacher's answers", "",
        "SmolLM2-135M-Instruct behind `transformers serve` on a CPU; a student of "
        f"{learned['parameters']['student']:,} parameters that had learned nothing. The commands are at the head of "
        "`benchmarks/alpaca.py`; one seed.", "",
        f"- {made['spent']['requests']:,} requests, {made['spent']['tokens']:,} tokens; "
        f"{made['kept']:,} conversations kept ({made['splits']['train']:,} to learn, "
        f"{made['splits']['test']:,} held out); not kept: {reasons or 'none'}.",
        f"- Loss of a held-out answer's token: {losses['before']:.3f} nats before, {losses['after']:.3f} after.",
        "", samples((folders["judge"] / "README.md").read_text()),
    ]  # fmt: skip
    (RESULTS / "alpaca-smollm2.md").write_text("\n".join(text))
    print("\n".join(text[:7]))


if __name__ == "__main__":
    main()
