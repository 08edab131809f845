"""Data from a closed teacher: request completions within a budget, journal them, check them and write them."""

from tutelage.generation.judge import JudgementResult, judge_answers
from tutelage.generation.run import GenerationResult, generate

__all__ = ["GenerationResult", "JudgementResult", "generate", "judge_answers"]
