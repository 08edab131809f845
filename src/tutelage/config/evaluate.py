"""The sections of a recipe for what a run measures and stores after the training."""

from typing import Annotated

from pydantic import Field

from tutelage.config.base import Count, CountOrZero, Section


class EvaluateConfig(Section):
    """Tasks of lm-evaluation-harness that score the final models (``pip install 'tutelage[lm-eval]'``). The scores go
    to ``tasks`` in ``summary.json``. For causal language models."""

    tasks: Annotated[list[str], Field(min_length=1)]
    """Names of the tasks, such as ``[arc_easy, hellaswag]``."""
    include: str | None = None
    """A folder with your own task files."""
    shots: CountOrZero | None = None
    """Number of examples in front of each question. Default: the task's own."""
    limit: Count | None = None
    """Number of questions of each task. Default: all."""
    batch_size: Count = 8
    """Number of texts in a batch."""
    chat: bool = False
    """Put the questions into the chat template."""


class SamplesConfig(Section):
    """Outputs on single test samples that a run stores for its page. They do not affect the training."""

    predictions: CountOrZero = 60
    """For classes: number of samples with the predictions of teacher and students; on two thirds of them teacher and
    student disagree."""
    generations: CountOrZero = 8
    """For language models: number of texts that teacher and students continue, by greedy decoding."""
    max_new_tokens: Count = 48
    """Most tokens of a continuation."""
