"""What language models are scored by in the end."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tutelage.config.base import Count, Section


class EvaluateConfig(Section):
    """Tasks of lm-evaluation-harness that the models of a finished run are scored by (``pip install
    'tutelage[lm-eval]'``); the scores go to ``tasks`` in ``summary.json``. For causal language models."""

    tasks: Annotated[list[str], Field(min_length=1)]
    """Their names, such as ``[arc_easy, hellaswag]``."""
    include: str | None = None
    """A folder with task files of your own."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Examples in front of each question. Default: what the task says."""
    limit: Count | None = None
    """Questions of each task. Default: all."""
    batch_size: Count = 8
    """Of texts that are scored at a time."""
    chat: bool = False
    """Whether questions are put into the chat template."""
