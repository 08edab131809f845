"""Models by name, and the folders that they are saved to and loaded from."""

from tutelage.models.build import ZOO, ModelSpec, build, label_names
from tutelage.models.files import MODEL_CARD, WEIGHTS, load_model, load_weights, save_model
from tutelage.models.texts import known_classes, source_of, tokenizer_of

__all__ = [
    "MODEL_CARD",
    "WEIGHTS",
    "ZOO",
    "ModelSpec",
    "build",
    "known_classes",
    "label_names",
    "load_model",
    "load_weights",
    "save_model",
    "source_of",
    "tokenizer_of",
]
