"""Intermediate activations of a model by module path, and its output head.

:class:`Observer` reads teacher and student of any kind. A string such as ``layer.1``, ``layer.1@0`` or
``encoder:input[hidden_states]`` names an activation; :mod:`tutelage.taps.tap` has the grammar.
"""

from tutelage.taps.calls import OutputReader, call_model, copy_model, logits_of, reader_of, scores_of, set_reader
from tutelage.taps.heads import (
    Adapter,
    Head,
    as_linear,
    count_tokens,
    output_head,
    padding_outputs,
    vocabulary_head,
)
from tutelage.taps.observe import Needs, Observation, Observer, compile_apart, evaluating, observe
from tutelage.taps.tap import Tap, find_module, parse_tap

__all__ = [
    "Adapter", "Head", "Needs", "Observation", "Observer", "OutputReader", "Tap", "as_linear", "call_model",
    "compile_apart", "copy_model", "count_tokens", "evaluating", "find_module", "logits_of", "observe", "output_head",
    "padding_outputs", "parse_tap", "reader_of", "scores_of", "set_reader", "vocabulary_head",
]  # fmt: skip
