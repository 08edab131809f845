"""Students: pruning, LoRA, quantisation-aware training, projectors, and where features are compared."""

from tutelage.students.classifiers import Classifier, find_classifier
from tutelage.students.embeddings import trim_embeddings
from tutelage.students.feature_sites import (
    find_channels_last,
    find_embedding_tap,
    find_last_norm,
    find_preactivations,
    find_stages,
    find_token_stage,
    to_channels_first,
)
from tutelage.students.layer_selection import LAYER_MAPS, block_influence, select_layers
from tutelage.students.lora import add_lora, describe_adapters, has_adapters, merge_lora
from tutelage.students.own_models import arguments_of, gives_one_score, prepare_outputs, split_inputs
from tutelage.students.projectors import (
    PROJECTORS,
    Projector,
    build_projector,
    dry_run,
    eval_no_grad,
    feature_shapes,
    match_dtype,
    resize_like,
)
from tutelage.students.pruning import PrunedStudent, prune
from tutelage.students.qat import add_fake_quantisers, is_quantisation_aware, to_float_model
from tutelage.students.reused_head import ReusedHead, reuse_head
from tutelage.students.scaled_outputs import scale_outputs
from tutelage.students.vocabulary_trimming import trim_tokenizer

__all__ = [
    "LAYER_MAPS",
    "PROJECTORS",
    "Classifier",
    "Projector",
    "PrunedStudent",
    "ReusedHead",
    "add_fake_quantisers",
    "add_lora",
    "arguments_of",
    "block_influence",
    "build_projector",
    "describe_adapters",
    "dry_run",
    "eval_no_grad",
    "feature_shapes",
    "find_channels_last",
    "find_classifier",
    "find_embedding_tap",
    "find_last_norm",
    "find_preactivations",
    "find_stages",
    "find_token_stage",
    "gives_one_score",
    "has_adapters",
    "is_quantisation_aware",
    "match_dtype",
    "merge_lora",
    "prepare_outputs",
    "prune",
    "resize_like",
    "reuse_head",
    "scale_outputs",
    "select_layers",
    "split_inputs",
    "to_channels_first",
    "to_float_model",
    "trim_embeddings",
    "trim_tokenizer",
]  # fmt: skip
