"""The section of a recipe that says what `tutelage search` tries."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from tutelage.config.base import Count, Fraction, Section, Seed
from tutelage.config.messages import Misfit
from tutelage.errors import shorten

Number = int | float


class KeySpace(Section):
    """What a key of the recipe may be: a range, or values to choose from."""

    low: Number | None = None
    """Lower end, included."""
    high: Number | None = None
    """Upper end, included. Whole numbers only where the key takes no others, or both ends and ``step`` are whole."""
    log: bool = False
    """Even on a logarithmic scale."""
    step: Number | None = None
    """Only ``low`` and multiples of this above it. Default: everything between."""
    values: Annotated[list[Any], Field(min_length=2)] | None = None
    """Values to choose from, of any kind, in place of a range. A list alone is short for this."""

    @model_validator(mode="after")
    def _one_kind(self) -> KeySpace:
        if self.values is not None:
            if self.low is not None or self.high is not None or self.step is not None or self.log:
                raise Misfit("both 'values' and a range are given; give one", "values")
            if any(value in self.values[:i] for i, value in enumerate(self.values)):
                raise Misfit(f"{shorten(self.values)} holds a value twice; remove it", "values")
            return self
        if self.low is None or self.high is None:
            raise Misfit("neither a range nor values; give 'low' and 'high', or a list of values", "low")
        if not -float("inf") < self.low < self.high < float("inf"):
            raise Misfit(f"low is {self.low} and high {self.high}; low must be below high", "high")
        if self.log and self.low <= 0:
            raise Misfit(f"low is {self.low}, which a logarithmic scale does not reach; give one above 0", "low")
        if self.step is not None and (self.log or not 0 < self.step <= self.high - self.low):
            raise Misfit(
                f"step is {self.step}; it must be above 0, at most the length of the range, and without 'log'", "step"
            )
        return self


def _listed(given: Any) -> Any:
    return {"values": given} if isinstance(given, list) else given


class SearchConfig(Section):
    """What `tutelage search` tries; a run takes no notice of it."""

    space: dict[str, Annotated[KeySpace, BeforeValidator(_listed)]] = Field(default_factory=dict)
    """Keys of the recipe, as in ``method.temperature``, each with a range or a list of values. Default: the method's
    temperature from 1 to 20 and its alpha from 0 to 1."""
    trials: Count = 20
    """How many settings are tried, pruned ones included."""
    seed: Seed = 0
    """Of the suggestions. The students' seeds are the recipe's."""
    prune: bool = True
    """Give a trial up at an evaluation where its best validation accuracy so far is below the median of the finished
    trials there."""
    startup: Count = 5
    """Trials that must be finished before one is given up."""
    warmup: Fraction = 0.5
    """Share of the first seed's training before a trial can be given up: early evaluations say little."""
