"""Intermediate activations of a model by module path, and its output head.

:class:`Observer` reads teacher and student of any kind. A string such as ``layer.1``, ``layer.1@0`` or
``encoder:input[hidden_states]`` names an activation; :mod:`tutelage.taps.tap` has the grammar.
"""

from tutelage.taps.observe import (
    Adapter,
    Head,
    Needs,
    Observation,
    Observer,
    as_linear,
    compile_apart,
    evaluating,
    logits_of,
    observe,
    output_head,
    vocabulary_head,
)
from tutelage.taps.tap import Tap, find_module, parse_tap

__all__ = [
    "Adapter", "Head", "Needs", "Observation", "Observer", "Tap", "as_linear", "compile_apart", "evaluating",
    "find_module", "logits_of", "observe", "output_head", "parse_tap", "vocabulary_head",
]  # fmt: skip
