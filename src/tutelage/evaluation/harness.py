"""Scores language models on tasks of lm-evaluation-harness."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tutelage.config import EvaluateConfig
from tutelage.errors import ConfigError, require, suggest

Scores = dict[str, dict[str, float]]
"""Metrics of each task; ``acc_stderr`` is the standard error of ``acc``."""


def harness(config: EvaluateConfig, tokenizer: Any) -> Callable[[nn.Module], Scores]:
    """A function that scores a causal language model on a recipe's tasks. Unknown names raise at once."""
    require("lm_eval", "lm-eval", "evaluate.tasks")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=config.include)
    for name in config.tasks:
        if name not in manager.all_tasks:
            raise ConfigError(
                f"lm-evaluation-harness has no task {name!r}{suggest(name, manager.all_tasks)}",
                where="evaluate.tasks",
                remedy="`lm-eval ls tasks` lists its own; 'include' names a folder of others",
            )

    def score(model: nn.Module) -> Scores:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        given: Any = model.eval()
        with torch.no_grad():
            output: Any = simple_evaluate(
                model=HFLM(pretrained=given, tokenizer=tokenizer, batch_size=config.batch_size),
                tasks=list(config.tasks), num_fewshot=config.shots, limit=config.limit, task_manager=manager,
                apply_chat_template=config.chat, log_samples=False, verbosity="ERROR",
            )  # fmt: skip
        return {task: _plain(metrics) for task, metrics in output["results"].items()}

    return score


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    """Numbers by name; a filter's name stays where it is one."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "," in key
    }
