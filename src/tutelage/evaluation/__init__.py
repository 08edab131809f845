"""Evaluation: metrics over a split, statistics over seeds, and lm-evaluation-harness by the names of its tasks."""

from tutelage.evaluation.evaluate import Said, classes_of, evaluate, evaluate_teacher, said_at

__all__ = ["Said", "classes_of", "evaluate", "evaluate_teacher", "said_at"]
