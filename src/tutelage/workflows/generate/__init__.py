"""From a closed teacher's answers to data: asked for within a budget, journalled, checked, written."""

from tutelage.workflows.generate.run import Generated, generate
from tutelage.workflows.generate.verdicts import Judged, judge

__all__ = ["Generated", "Judged", "generate", "judge"]
