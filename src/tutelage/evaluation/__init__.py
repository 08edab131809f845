"""Evaluation: metrics over a split, statistics over seeds, and lm-evaluation-harness by the names of its tasks."""

from tutelage.evaluation.evaluate import TeacherOutput, classes_of, evaluate, evaluate_teacher, get_teacher_output

__all__ = ["TeacherOutput", "classes_of", "evaluate", "evaluate_teacher", "get_teacher_output"]
