"""The section of a recipe for `tutelage search`."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tutelage.config.base import Count, Fraction, Section, Seed
from tutelage.errors import shorten

Number = int | float


class KeySpace(Section):
    """The values that a search may give a key of the recipe: a range, or a list."""

    low: Number | None = None
    """Lower end, included."""
    high: Number | None = None
    """Upper end, included. Only integers are tried if the key is an integer, or if both ends and ``step`` are."""
    log: bool = False
    """Sample on a logarithmic scale."""
    step: Number | None = None
    """Only ``low`` plus multiples of this step. Default: any value of the range."""
    values: Annotated[list[Any], Field(min_length=2)] | None = None
    """Values to choose from, of any type, in place of a range. A plain list is short for this."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """A range and values together, or a range that is not one."""
        if self.values is not None:
            if self.low is not None or self.high is not None or self.step is not None or self.log:
                yield "values", "both 'values' and a range are given; give one"
            if any(value in self.values[:i] for i, value in enumerate(self.values)):
                yield "values", f"{shorten(self.values)} holds a value twice; remove it"
        elif self.low is None or self.high is None:
            yield "low", "neither a range nor values; give 'low' and 'high', or a list of values"
        elif not -float("inf") < self.low < self.high < float("inf"):
            yield "high", f"low is {self.low} and high {self.high}; low must be below high"
        elif self.log and self.low <= 0:
            yield "low", f"low is {self.low}, which a logarithmic scale does not reach; give one above 0"
        elif self.step is not None and (self.log or not 0 < self.step <= self.high - self.low):
            what = f"step is {self.step}; it must be above 0, at most the length of the range, and without 'log'"
            yield "step", what


def _listed(given: Any) -> Any:
    return {"values": given} if isinstance(given, list) else given


class SearchConfig(Section):
    """The search space and the trials of `tutelage search`; `tutelage run` ignores this section."""

    space: dict[str, Annotated[KeySpace, BeforeValidator(_listed)]] = Field(default_factory=dict)
    """Keys of the recipe, such as ``method.temperature``, each with a range or a list of values. Default: the
    method's temperature from 1 to 20 and its alpha from 0 to 1."""
    trials: Count = 20
    """Number of trials, pruned ones included."""
    seed: Seed = 0
    """Seed of the suggestions. The students' seeds are the recipe's ``seeds``."""
    prune: bool = True
    """Stop a trial at an evaluation where its best validation accuracy so far is below the median of the finished
    trials at that evaluation."""
    startup: Count = 5
    """Number of trials that finish before the first one is pruned."""
    warmup: Fraction = 0.5
    """Share of the first seed's training before a trial can be pruned, because early evaluations predict little."""
