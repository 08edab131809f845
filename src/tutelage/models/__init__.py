"""Models by name, and the folders that they are saved to and loaded from."""

from tutelage.models.build import ZOO, ModelSpec, build, label_names
from tutelage.models.files import MODEL_CARD, WEIGHTS, load_model, load_weights, save_model
from tutelage.models.image_files import ImageFiles, read_image_files
from tutelage.models.pretrained import load_tokenizer, read_class_names, resolve_source

__all__ = [
    "MODEL_CARD", "WEIGHTS", "ZOO", "ImageFiles", "ModelSpec", "build", "label_names", "load_model", "load_tokenizer",
    "load_weights", "read_class_names", "read_image_files", "resolve_source", "save_model",
]  # fmt: skip
