"""Intermediate activations of a model by module path, and its output head.

:class:`Observer` reads teacher and student of any kind. A string such as ``layer.1``, ``layer.1@0`` or
``encoder:input[hidden_states]`` names an activation; :mod:`tutelage.taps.tap` has the grammar.
"""

from tutelage.taps.heads import (
    Adapter,
    Head,
    as_linear,
    count_tokens,
    output_head,
    padding_outputs,
    vocabulary_head,
)
from tutelage.taps.observe import Needs, Observation, Observer, compile_apart, evaluating, logits_of, observe
from tutelage.taps.tap import Tap, find_module, parse_tap

__all__ = [
    "Adapter", "Head", "Needs", "Observation", "Observer", "Tap", "as_linear", "compile_apart", "count_tokens",
    "evaluating", "find_module", "logits_of", "observe", "output_head", "padding_outputs", "parse_tap",
    "vocabulary_head",
]  # fmt: skip
