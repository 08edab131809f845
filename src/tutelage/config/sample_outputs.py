"""The section of a recipe for the sample outputs on the page of a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tutelage.config.base import Count, Section

None_or_more = Annotated[int, Field(ge=0)]


class SamplesConfig(Section):
    """Outputs on single test samples that a run stores for its page. They do not affect the training."""

    predictions: None_or_more = 60
    """For classes: number of samples with the predictions of teacher and students; on two thirds of them teacher and
    student disagree."""
    generations: None_or_more = 8
    """For language models: number of texts that teacher and students continue, by greedy decoding."""
    max_new_tokens: Count = 48
    """Most tokens of a continuation."""
