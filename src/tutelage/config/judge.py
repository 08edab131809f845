"""The section of a recipe for `tutelage judge`: the models whose answers are compared, and the judge."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from tutelage.config.base import Count, LocatedSection, RecipeName, Section
from tutelage.config.generate import (
    BudgetConfig,
    EndpointConfig,
    Generations,
    SamplingConfig,
    pattern_misfit,
    price_misfit,
    read_prompt,
)
from tutelage.errors import shorten

GIVEN = "given"
"""The answers in the file of prompts."""


class JudgeConfig(Section):
    """Settings of `tutelage judge`, which compares answers to held-out prompts, two by two, each pair in both
    orders."""

    endpoint: EndpointConfig
    """The judge. Keys as in ``generate.endpoint``."""
    prompts: str
    """A file of conversations, as ``generate`` writes them, or of prompts: ``.jsonl``, ``.json``, ``.csv``,
    ``.parquet``, ``.txt``."""
    answers: Annotated[dict[str, str], Field(min_length=2)]
    """The models to compare, by name: a language model with its tokenizer, as in ``{after: hf:runs/mine/student}``,
    or ``given``: the last answers in the file, which are the teacher's."""
    count: Count = 100
    """Number of prompts, from the start of the file."""
    max_tokens: Count = 192
    """Most tokens of an answer. Decoding is greedy."""
    template: str = read_prompt("verdict")
    """Template of the judge's prompt, with ``prompt``, ``first`` and ``second``."""
    choice: str = r"\b(A|B|[Tt]ie)\b"
    """Regular expression; the first group of its first match is the verdict: A or B; anything else is a tie."""
    sampling: SamplingConfig = Field(default_factory=lambda: SamplingConfig(temperature=0.0, max_tokens=8))
    """Sampling of the judge. Keys as in ``generate.sampling``."""
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    """Limits on requests, tokens and money. Keys as in ``generate.budget``."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """A wrong pattern, a model without a price, or answers that cannot be compared."""
        yield from pattern_misfit(self.choice, "choice", groups=True)
        yield from price_misfit(self.budget, [self.endpoint])
        for name, model in self.answers.items():
            if model != GIVEN and model.partition(":")[0] not in ("hf", "package"):
                yield f"answers.{name}", f"is {shorten(model)}; name a model as hf:FOLDER, or 'given'"
        if len(set(self.answers.values())) < len(self.answers):
            yield "answers", "two of 'answers' are the same, and would tie; remove one"


class EndpointRecipe(LocatedSection):
    """A recipe without a training: it generates data, or compares answers."""

    name: RecipeName
    generate: Annotated[Generations, Field(discriminator="kind")] | None = None
    judge: JudgeConfig | None = None
