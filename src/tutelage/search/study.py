"""The study of a search: optuna's, in a journal file, with suggestions that a restart repeats.

Only the process that holds the search's folder reads and writes it, so optuna's file locks are switched off: the
folder's own lock ends with the process.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from tutelage.config import SearchConfig
from tutelage.errors import RunDirectoryError
from tutelage.files import wrap_write_errors
from tutelage.search.search_space import SearchDimension, recipe_values

STATES = {
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
"""How a trial can end, and its state for optuna: suggestions avoid values that diverged."""

SEED_STEP = 1_000_000
"""Evaluations of the first seed are reported at their number; the mean of the first n seeds at n times this step."""


@dataclass
class TrialResult:
    """How a trial ended.

    Attributes:
        seeds: last validation accuracy of each seed that was trained to the end.
        seconds: in the process that ended it.
    """

    state: str
    seeds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    why: str | None = None


class TrialRequest(NamedTuple):
    """A trial to run: its number, and values by key."""

    number: int
    values: dict[str, Any]


class _SeededSampler(BaseSampler):
    """TPE whose samples are a function of the search's seed, the trial's number, the key and the finished trials."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _sampler(self, trial: FrozenTrial, key: str = "") -> TPESampler:
        digest = hashlib.sha256(f"{self.seed} {trial.number} {key}".encode()).digest()
        return TPESampler(seed=int.from_bytes(digest[:4], "big"))

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler(trial).infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return self._sampler(trial).sample_relative(study, trial, search_space)

    def sample_independent(self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        return self._sampler(trial, param_name).sample_independent(study, trial, param_name, param_distribution)


class _NoLock:
    """In place of a lock file, which a killed process would leave behind."""

    def acquire(self) -> bool:
        """At once."""
        return True

    def release(self) -> None:
        """Nothing."""


class SearchStudy:
    """Suggests trials and stores their results."""

    def __init__(self, journal: Path, space: Sequence[SearchDimension], config: SearchConfig) -> None:
        self.space, self.journal = list(space), journal
        pruner = optuna.pruners.MedianPruner(n_startup_trials=config.startup)
        with self._optuna():
            if journal.exists():
                os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)
            try:
                storage = JournalStorage(JournalFileBackend(str(journal), lock_obj=_NoLock()))
                self.study = optuna.create_study(
                    storage=storage, study_name="search", direction="maximize", sampler=_SeededSampler(config.seed),
                    pruner=pruner if config.prune else optuna.pruners.NopPruner(), load_if_exists=True,
                )  # fmt: skip
            except (ValueError, KeyError, TypeError) as error:
                raise RunDirectoryError(
                    f"is damaged: {error}", where=str(journal), remedy="start the search again with another --out"
                ) from None
            own = recipe_values(space)
            if own is not None and not self._all():
                self.study.enqueue_trial(
                    {d.key: own[d.key] if d.values is None else json.dumps(own[d.key]) for d in space}
                )
        self.running: dict[int, optuna.Trial] = {}

    @contextmanager
    def _optuna(self) -> Iterator[None]:
        """Silence optuna's log, and report errors of the disk."""
        before = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.CRITICAL)
        try:
            with wrap_write_errors(self.journal):
                yield
        finally:
            optuna.logging.set_verbosity(before)

    def _all(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def count(self) -> int:
        """Trials that have ended or are running."""
        return len(self.running) + sum(t.state.is_finished() for t in self._all())

    def next(self) -> TrialRequest:
        """A trial that a killed process did not finish; if there is none, a new one."""
        with self._optuna():
            left = [t for t in self._all() if t.state == TrialState.RUNNING and t.number not in self.running]
            trial = optuna.Trial(self.study, left[0]._trial_id) if left else self.study.ask()
            values = {d.key: _from_optuna(d, _suggest(trial, d)) for d in self.space}
        self.running[trial.number] = trial
        return TrialRequest(trial.number, values)

    def report(self, number: int, step: int, value: float) -> bool:
        """Store a validation accuracy; return whether the trial is to be pruned.

        A resumed trial reports its earlier values again; of these only the last can prune it.
        """
        trial = self.running[number]
        last = max(self._all()[number].intermediate_values, default=-1)
        if step < last:
            return False
        with self._optuna():
            if step > last:
                trial.report(value, step)
            return bool(trial.should_prune())

    def finish(self, number: int, result: TrialResult) -> None:
        """Store how a trial ended."""
        trial = self.running.pop(number)
        with self._optuna():
            for name, fact in vars(result).items():
                if fact is not None:
                    trial.set_user_attr(name, round(fact, 2) if name == "seconds" else fact)
            value = sum(result.seeds) / len(result.seeds) if result.state == "finished" else None
            self.study.tell(trial, value, state=STATES[result.state])

    def trials(self) -> list[dict[str, Any]]:
        """Every trial that has ended, by number, for ``search.json``."""
        return [
            {
                "number": t.number,
                "state": t.user_attrs["state"],
                "values": {d.key: _from_optuna(d, t.params[d.key]) for d in self.space},
                "validation": t.value if t.value is not None and math.isfinite(t.value) else None,
                "seeds": t.user_attrs.get("seeds", []),
                "evaluations": [v for step, v in sorted(t.intermediate_values.items()) if step < SEED_STEP],
                "seconds": t.user_attrs.get("seconds", 0.0),
                "why": t.user_attrs.get("why"),
            }
            for t in self._all()
            if t.state.is_finished()
        ]

    def importance(self) -> dict[str, float]:
        """Importance of each key by PED-ANOVA; empty with fewer than two keys or eight finished trials."""
        finished = [t for t in self._all() if t.state == TrialState.COMPLETE]
        if len(self.space) < 2 or len(finished) < 8:
            return {}
        with self._optuna():
            try:
                shares = optuna.importance.get_param_importances(self.study)
            except (RuntimeError, ValueError):
                return {}
        return {key: float(share) for key, share in shares.items() if math.isfinite(share)}


def _suggest(trial: optuna.Trial, d: SearchDimension) -> Any:
    if d.values is not None:
        return trial.suggest_categorical(d.key, [json.dumps(value) for value in d.values])
    high = d.high if d.step is None else d.low + math.floor((d.high - d.low) / d.step + 1e-9) * d.step
    if d.whole:
        return trial.suggest_int(d.key, int(d.low), int(high), log=d.log, step=int(d.step or 1))
    return trial.suggest_float(d.key, float(d.low), float(high), log=d.log, step=d.step)


def _from_optuna(d: SearchDimension, value: Any) -> Any:
    return d.round(value if d.values is None else json.loads(value))
