"""Evaluation: metrics over a split, statistics over seeds, and lm-evaluation-harness by the names of its tasks."""

from tutelage.evaluation.evaluate import TeacherOutput, count_classes, evaluate, evaluate_teacher, get_teacher_output

__all__ = ["TeacherOutput", "count_classes", "evaluate", "evaluate_teacher", "get_teacher_output"]
