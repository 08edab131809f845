"""The ``workflow`` of a recipe: born-again generations and chains of assistants."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tutelage.config.base import Count, Section, Share, by_kind
from tutelage.config.models import ModelConfig


class BornAgainConfig(Section):
    """Generations of one architecture; each is the teacher of the next (Furlanello et al., 2018)."""

    kind: Literal["born-again"] = "born-again"
    """The workflow."""
    generations: Count = 3
    """Distilled generations. Generation 0 is the baseline student; each has its own initialisation."""
    ensemble: bool = True
    """Also score the mean of the probabilities of generations 0 to n, for every n."""
    controls: list[Literal["label-smoothing", "teacher-free"]] = Field(default_factory=list)
    """Control students without a teacher, with the first generation's initial weights and steps: they show how much
    of the gain needs no teacher."""


class AssistantChainConfig(Section):
    """From teacher to student through assistants of sizes between (Mirzadeh et al., 2020)."""

    kind: Literal["assistant-chain"] = "assistant-chain"
    """The workflow."""
    assistants: Annotated[
        Annotated[list[ModelConfig], Field(min_length=1)] | None,
        BeforeValidator(lambda g: None if g == "auto" else g),
    ] = None
    """Models from the largest to the smallest. ``auto``, the default: the fewest copies of the recipe's student, made
    larger in equal steps, with which no student has less than ``ratio`` of its teacher's parameters."""
    family: Literal["width", "depth"] = "width"
    """Which size of the student ``auto`` increases."""
    ratio: Share = 0.1
    """Smallest share of its teacher's parameters that ``auto`` gives a student."""
    direct: bool = True
    """Also distil the student from the teacher directly, for comparison."""


WORKFLOW_KINDS: dict[str, type[Section]] = by_kind(BornAgainConfig | AssistantChainConfig)
"""Every workflow that a recipe can name, with its options."""
