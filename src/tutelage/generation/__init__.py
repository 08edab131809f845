"""From a closed teacher's answers to data: asked for within a budget, journalled, checked, written."""

from tutelage.generation.judge import Judged, judge
from tutelage.generation.run import Generated, generate

__all__ = ["Generated", "Judged", "generate", "judge"]
