"""The section of a recipe that says what a run keeps of single samples, for its page."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tutelage.config.base import Count, Section

None_or_more = Annotated[int, Field(ge=0)]


class SamplesConfig(Section):
    """What a run keeps of the test split, sample by sample, for its page. It changes nothing of what is trained."""

    predictions: None_or_more = 60
    """Of classes: samples with what teacher and students say of them, two of three such on which teacher and student
    disagree. 0 for none."""
    generations: None_or_more = 8
    """Of language models: texts that teacher and students go on with, the likeliest token each time. 0 for none."""
    max_new_tokens: Count = 48
    """Most tokens that each of them writes."""
