"""The memory of a search: optuna's study in a journal file, with suggestions that a restart repeats.

One process alone reads and writes it, the one that holds the search's folder.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from tutelage.config import SearchConfig
from tutelage.errors import RunDirectoryError
from tutelage.files import wrap_write_errors
from tutelage.search.search_space import SearchDimension, own_values

STATES = {
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
"""What a trial can end as, and what optuna makes of it: its suggestions keep away from what diverged."""

WHOLE_SEED = 1_000_000
"""Evaluations of the first seed are reported under their number; the mean of the first n seeds under n times this."""


@dataclass
class TrialResult:
    """What became of a trial.

    Attributes:
        state: one of :data:`STATES`.
        seeds: last validation accuracy of each seed that was trained to its end.
        seconds: in the process that ended it.
        why: it diverged or failed.
    """

    state: str
    seeds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    why: str | None = None


@dataclass(frozen=True)
class TrialRequest:
    """A trial to run: its number, and values by key."""

    number: int
    values: dict[str, Any]


class _Seeded(BaseSampler):
    """TPE whose draws are a function of the search's seed, the trial's number, the key and the finished trials."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _fresh(self, trial: FrozenTrial, what: str = "") -> TPESampler:
        digest = hashlib.sha256(f"{self.seed} {trial.number} {what}".encode()).digest()
        return TPESampler(seed=int.from_bytes(digest[:4], "big"))

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._fresh(trial).infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return self._fresh(trial).sample_relative(study, trial, search_space)

    def sample_independent(self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        return self._fresh(trial, param_name).sample_independent(study, trial, param_name, param_distribution)


class _HeldAnyway:
    """No lock: the search's folder is locked, by a lock that the system lets go when its process is killed."""

    def acquire(self) -> bool:
        """At once."""
        return True

    def release(self) -> None:
        """Nothing."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna says nothing; what matters is said by the search."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


class SearchStudy:
    """What to try next, and what has been tried.

    Args:
        journal: the file; made if absent, its last line dropped where a killed process cut it short.
        space: what may be set.
        config: seed, and how trials are given up.

    Raises:
        RunDirectoryError: the journal is damaged, or cannot be written.
    """

    def __init__(self, journal: Path, space: Sequence[SearchDimension], config: SearchConfig) -> None:
        self.space, self.journal = list(space), journal
        pruner = optuna.pruners.MedianPruner(n_startup_trials=config.startup)
        with wrap_write_errors(journal), _quiet():
            _mend(journal)
            try:
                storage = JournalStorage(JournalFileBackend(str(journal), lock_obj=_HeldAnyway()))
                self.study = optuna.create_study(
                    storage=storage, study_name="search", direction="maximize", sampler=_Seeded(config.seed),
                    pruner=pruner if config.prune else optuna.pruners.NopPruner(), load_if_exists=True,
                )  # fmt: skip
            except (ValueError, KeyError, TypeError) as error:
                raise RunDirectoryError(
                    f"is damaged: {error}", where=str(journal), remedy="the search cannot go on: choose another --out"
                ) from None
            own = own_values(space)
            if own is not None and not self.study.get_trials(deepcopy=False):
                self.study.enqueue_trial({d.key: _stored(d, own[d.key]) for d in space})
        self.out: dict[int, optuna.Trial] = {}

    def taken(self) -> int:
        """Trials that are over or being run."""
        trials = self.study.get_trials(deepcopy=False)
        return len(self.out) + sum(t.state.is_finished() for t in trials)

    def next(self) -> TrialRequest:
        """A trial that a killed process left, else a new one."""
        with wrap_write_errors(self.journal), _quiet():
            left = [
                t for t in self.study.get_trials(deepcopy=False)
                if t.state == TrialState.RUNNING and t.number not in self.out
            ]  # fmt: skip
            trial = optuna.Trial(self.study, left[0]._trial_id) if left else self.study.ask()
            values = {}
            for d in self.space:
                value = _suggested(trial, d)
                values[d.key] = d.rounded(value if d.values is None else json.loads(value))
        self.out[trial.number] = trial
        return TrialRequest(trial.number, values)

    def report(self, number: int, step: int, value: float) -> bool:
        """Take note of a validation accuracy; true where the trial is to be given up.

        What a killed process reported already is not judged again before the last of it.
        """
        trial = self.out[number]
        known = self.study.get_trials(deepcopy=False)[number]
        last = max(known.intermediate_values, default=-1)
        if step < last:
            return False
        with wrap_write_errors(self.journal), _quiet():
            if step > last:
                trial.report(value, step)
            return bool(trial.should_prune())

    def finish(self, number: int, result: TrialResult) -> None:
        """Take note of how a trial ended."""
        trial = self.out.pop(number)
        with wrap_write_errors(self.journal), _quiet():
            trial.set_user_attr("state", result.state)
            trial.set_user_attr("seeds", result.seeds)
            trial.set_user_attr("seconds", round(result.seconds, 2))
            if result.why is not None:
                trial.set_user_attr("why", result.why)
            value = sum(result.seeds) / len(result.seeds) if result.state == "finished" else None
            self.study.tell(trial, value, state=STATES[result.state])

    def trials(self) -> list[dict[str, Any]]:
        """Every trial that is over, by number, as ``search.json`` has it."""
        return [self._told(t) for t in self.study.get_trials(deepcopy=False) if t.state.is_finished()]

    def _told(self, t: FrozenTrial) -> dict[str, Any]:
        curve = {step: v for step, v in sorted(t.intermediate_values.items()) if step < WHOLE_SEED}
        values = {
            d.key: d.rounded(t.params[d.key] if d.values is None else json.loads(t.params[d.key]))
            for d in self.space
        }  # fmt: skip
        value = t.value if t.value is not None and math.isfinite(t.value) else None
        return {
            "number": t.number,
            "state": t.user_attrs["state"],
            "values": values,
            "validation": value,
            "seeds": t.user_attrs.get("seeds", []),
            "evaluations": list(curve.values()),
            "seconds": t.user_attrs.get("seconds", 0.0),
            "why": t.user_attrs.get("why"),
        }

    def importance(self) -> dict[str, float]:
        """Share of each key in what makes trials differ, by PED-ANOVA; empty where there is too little to say."""
        done = [t for t in self.study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
        if len(self.space) < 2 or len(done) < 8:
            return {}
        with _quiet():
            try:
                found = optuna.importance.get_param_importances(self.study)
            except (RuntimeError, ValueError):
                return {}
        return {key: float(share) for key, share in found.items() if math.isfinite(share)}


def _suggested(trial: optuna.Trial, d: SearchDimension) -> Any:
    if d.values is not None:
        return trial.suggest_categorical(d.key, [json.dumps(value) for value in d.values])
    high = d.high if d.step is None else d.low + math.floor((d.high - d.low) / d.step + 1e-9) * d.step
    if d.whole:
        return trial.suggest_int(d.key, int(d.low), int(high), log=d.log, step=int(d.step or 1))
    return trial.suggest_float(d.key, float(d.low), float(high), log=d.log, step=d.step)


def _stored(d: SearchDimension, value: Any) -> Any:
    return json.dumps(value) if d.values is not None else value


def _mend(journal: Path) -> None:
    """Drop what a killed process wrote of a line."""
    if not journal.exists():
        return
    text = journal.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with open(journal, "r+b") as file:
            file.truncate(len(whole))
