"""The ``workflow`` of a recipe: born-again generations and chains of assistants."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tutelage.config.base import Count, Section
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
    """Students with the first generation's initial weights and steps and without a teacher: the gain that needs no
    teacher."""


def _auto(given: Any) -> Any:
    return None if given == "auto" else given


class AssistantChainConfig(Section):
    """From teacher to student through assistants of sizes between (Mirzadeh et al., 2020)."""

    kind: Literal["assistant-chain"] = "assistant-chain"
    """The workflow."""
    assistants: Annotated[Annotated[list[ModelConfig], Field(min_length=1)] | None, BeforeValidator(_auto)] = None
    """Models from the largest to the smallest; or ``auto``: the fewest with which no student has less than ``ratio``
    of its teacher's parameters, in equal steps, each the recipe's student made larger."""
    family: Literal["width", "depth"] = "width"
    """What ``auto`` makes larger: the student's width or its depth."""
    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """The least share of its teacher's parameters that ``auto`` gives a student."""
    direct: bool = True
    """Also distil the student from the teacher directly, for comparison."""


WORKFLOW_KINDS: dict[str, type[Section]] = {"assistant-chain": AssistantChainConfig, "born-again": BornAgainConfig}
"""Every workflow that a recipe can name, with its options."""
