"""Write docs/recipes.md and docs/recipe.schema.json from the classes that check recipes."""

from __future__ import annotations

import ast
import functools
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tutelage import config, losses
from tutelage.config import FEATURE_LOSSES, LOGIT_LOSSES, LossOptions
from tutelage.data import views
from tutelage.engine import optim
from tutelage.errors import ConfigError
from tutelage.models import ZOO

PAGE = Path(__file__).with_name("recipes.md")
SCHEMA = Path(__file__).with_name("recipe.schema.json")

SECTIONS: dict[str, type[BaseModel]] = {
    "data": config.DataConfig,
    "data: kind: texts": config.TextDataConfig,
    "teacher": config.TeacherConfig,
    "teacher.members": config.MemberConfig,
    "teacher.endpoint": config.teachers.RemoteTeacherConfig,
    "teacher.inference": config.TeacherInferenceConfig,
    "teacher.cache": config.CacheConfig,
    "student": config.StudentConfig,
    "student.lora": config.LoraConfig,
    "workflow: kind: born-again": config.BornAgainConfig,
    "workflow: kind: assistant-chain": config.AssistantChainConfig,
    "method: kind: logit": config.LogitOptions,
    "method: kind: feature": config.FeatureOptions,
    "method: kind: simkd": config.methods.feature.SimkdOptions,
    "method: kind: triple": config.methods.encoders.TripleOptions,
    "method: kind: tinybert": config.methods.encoders.TinybertOptions,
    "method: kind: minilm": config.methods.encoders.MinilmOptions,
    "method: kind: patient": config.methods.encoders.PatientOptions,
    "method: kind: embedding": config.methods.encoders.EmbeddingOptions,
    "method: kind: byot": config.methods.teacherless.ByotOptions,
    "method: kind: token": config.methods.language.TokenOptions,
    "method: kind: on-policy": config.methods.language.OnPolicyOptions,
    "method.rollouts": config.methods.language.RolloutsOptions,
    "method: kind: cross-tokenizer": config.methods.language.CrossTokenizerOptions,
    "method: kind: sequence": config.methods.language.SequenceOptions,
    "method: kind: mutual": config.methods.teacherless.MutualOptions,
    "method: kind: supervised": config.methods.teacherless.SupervisedOptions,
    "method: kind: teacher-free": config.methods.teacherless.TeacherFreeOptions,
    "method.pairs": config.methods.feature.PairOptions,
    "train": config.TrainConfig,
    "train.optimizer": config.OptimizerConfig,
    "train.schedule": config.ScheduleConfig,
    "samples": config.SamplesConfig,
    "evaluate": config.EvaluateConfig,
    "search": config.SearchConfig,
    "search.space": config.KeySpace,
    "generate": config.generate.GenerateConfig,
    "generate: kind: answer": config.AnswerConfig,
    "generate: kind: self-instruct": config.SelfInstructConfig,
    "generate: kind: evolve": config.EvolveConfig,
    "generate: kind: conversation": config.ConversationConfig,
    "generate.endpoint": config.EndpointConfig,
    "generate.sampling": config.SamplingConfig,
    "generate.best": config.BestConfig,
    "generate.budget": config.BudgetConfig,
    "generate.budget.prices": config.generate.PriceConfig,
    "generate.quality": config.QualityConfig,
    "generate.quality.decontaminate": config.generate.DecontaminateConfig,
    "judge": config.JudgeConfig,
}

UNDOCUMENTED = {
    "Recipe.data": "See below.",
    "Recipe.method": "See below.",
    "Recipe.name": "Names the run directory. Default: the file's name.",
    "Recipe.student": "See below.",
    "Recipe.train": "Training of the students, and defaults for the teacher's training. See below.",
}
"""Meaning of fields that have no docstring of their own in config/."""

SCHEDULES = {
    "constant": "The learning rate does not change.",
    "cosine": "Falls from `lr` to `final` (0) times `lr`, along half a cosine.",
    "exponential": "Is multiplied by `gamma` (0.95) after each epoch.",
    "linear": "Falls linearly from `lr` to `final` (0) times `lr`.",
    "multistep": "Is multiplied by `gamma` (0.1) at each of the epochs `milestones`, which must be given.",
    "onecycle": "Rises from `lr` / 25 to `lr` in the fraction `rise` (0.3) of the steps, then falls to almost 0.",
    "polynomial": "Falls to 0, as a polynomial of degree `power` (1).",
    "step": "Is multiplied by `gamma` (0.1) after every `every` (30) epochs.",
}

INTRO = """\
# Recipes

<!-- Written by `python docs/generate.py` from src/tutelage/config/. Edit that, not this. -->

A recipe is a YAML file that describes data, teacher, student, method and training. `tutelage run RECIPE` runs it.

```yaml
{example}```

- An unknown key, a wrong type or a value out of range is an error before any training. The message names the line and
  the allowed values. No key is ignored.
- `key=value` on the command line overrides a key: `tutelage run recipes/digits.yaml method.temperature=8 seed=1`.
  Dots separate sections, the value is YAML, and `null` unsets a key. `seed: 1` is short for `seeds: [1]`;
  `train.steps=100` replaces `epochs`.
- `data: digits` is short for `data: {{source: digits}}`; `teacher: mlp` and `student: mlp` for `{{model: mlp}}`;
  `method: logit`, `workflow: born-again`, `optimizer: sgd` and `schedule: cosine` for `{{kind: ...}}`.
- Values follow YAML 1.2: `1e-3` is a number; `no`, `on` and `off` are strings.
- `teacher.train` takes missing keys from `train`. If its optimizer or schedule has another `kind`, it takes only
  `lr`, `weight_decay` and `warmup`.
- The run directory has the complete recipe, with defaults, as `config.yaml`.
"""

ABOUT_AUGMENTATIONS = """\
A list, applied in order: `[flip, {shift: 2}, {erase: {p: 0.5, value: 0}}]`. The random numbers are a function of
run seed, epoch and sample, so teacher and student see the same view. Transforms of `torchvision.transforms.v2` need
the extra `vision`. `mixup` and `cutmix` must be last in the list. They combine the image with a view of another
image. The result has no single class, so it is used only to train the distilled student on the teacher's outputs
(function matching), without hard labels. The baseline student and the teacher are trained without `mixup` and
`cutmix`.
"""

ABOUT_MODELS = """\
Other names: `timm:NAME` and `torchvision:NAME` (options go to the constructor), `hf:ID` (options go to
`from_pretrained`), `package.module:callable` (called with `options`, and with `classes`, `num_classes`, `channels`
and `size` if it has these parameters).

A teacher with pretrained weights (`hf:ID`, timm's `pretrained`, torchvision's `weights`) is not trained, unless
`teacher.train` is set, which fine-tunes it; see
[imagenet-resnet34-resnet18.yaml](../recipes/imagenet-resnet34-resnet18.yaml).
"""


ABOUT_FEATURE_LOSSES = """\
Published weights for a mean over elements are converted for losses that sum over elements, so the loss is the same.
Learned parts of a loss are trained together with the student and not exported:

- `hint`: a projector, if the numbers of channels differ. The paper uses one stage; `auto` uses all stages that both
  have. `stage1_fraction: 0.3` trains on the hints alone for 30 % of the steps, then without them, as FitNets does.
- `vid`: three 1x1 convolutions to the teacher's mean, and a variance for each channel.
- `overhaul`: a 1x1 convolution and batch norm. The margins come from the teacher's last batch norm before the tap.
  Tap the input of an activation: `layer1.1.relu@1:input`. The authors' teacher is in training mode
  (`teacher.mode: train_bn`), and their weight on ImageNet is 1e-4.
- `review`: fusion modules from the deepest pair to the shallowest. The authors use the teacher's maps before the
  activation, add the pooled feature as the deepest pair, and increase the weight over 20 epochs; `auto` does not.
- `rkd_distance`, `rkd_angle`: embeddings without normalisation, as in the CRD benchmark; Park et al. normalise them.
- `factor_transfer`: a translator, and a paraphraser of the teacher's feature, which is trained first for the fraction
  `share` of the steps.
- `crd`: a linear head for each embedding, and a memory of all training examples, which checkpoints contain.
- `attention_kl` and `attention_mse` compare attention weights: `bert.encoder.layer.0.attention.self[1]` of a model
  with `attn_implementation: eager`. `value_relation` compares values: `...attention.self.value`.
"""


@functools.cache
def field_docs(cls: type[BaseModel]) -> dict[str, str]:
    """The docstring under each field of ``cls`` and its bases, which Python does not keep."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not base.__module__.startswith(config.__name__):
            continue
        (tree,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(tree, ast.ClassDef)
        for field, after in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                name = field.target.id
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    docs[name] = inspect.cleandoc(str(after.value.value))
    return docs


def meaning(cls: type[BaseModel], name: str) -> str:
    """What a field means, in one line."""
    for base in cls.__mro__:
        if f"{base.__name__}.{name}" in UNDOCUMENTED and name not in field_docs(cls):
            return UNDOCUMENTED[f"{base.__name__}.{name}"]
    return " ".join(field_docs(cls)[name].replace("``", "`").split())


def type_words(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words: ``number > 0``."""
    if "$ref" in schema or "oneOf" in schema:
        return "section"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        parts = [type_words(s) for s in schema["anyOf"] if s.get("type") != "null"]
        return " or ".join(parts)
    match schema.get("type"):
        case "array":
            least = {0: "", 1: ", at least one"}.get(n := schema.get("minItems", 0), f", at least {n}")
            item = type_words(schema["items"]).replace("number", "numbers") if schema["items"] else ""
            return f"list{f' of {item}' if item else ''}{least}"
        case "object":
            return "mapping"
        case "boolean":
            return "true or false"
        case "string":
            return "text"
        case kind:
            word = {"integer": "whole number", "number": "number"}[str(kind)]
            signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
            limits = [f"{sign} {schema[key]:,.10g}" for key, sign in signs.items() if key in schema]
            return " ".join([word, ", ".join(limits)]).strip()


def default_words(cls: type[BaseModel], name: str) -> str:
    """A field's default as YAML; a dash where the key is simply absent."""
    field = cls.model_fields[name]
    if name == "kind" and issubclass(cls, config.MethodOptions) and cls is not config.LogitOptions:
        return "**must be given**"
    if field.is_required():
        return "by file name" if (cls, name) == (config.Recipe, "name") else "**must be given**"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel):
        return "–"
    text = value if isinstance(value, str) else json.dumps(value)
    return "a template of our own" if "\n" in text or "\\n" in text else f"`{text}`"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """A Markdown table."""
    header = list(header)
    for row in (header, ["---"] * len(header), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


def keys(cls: type[BaseModel]) -> Iterator[str]:
    """The table of a section's keys, without those that all kinds of generation share."""
    schema = cls.model_json_schema()
    shared = config.generate.GenerateConfig.model_fields if config.generate.GenerateConfig in cls.__bases__ else ()
    yield from table(
        ("key", "value", "default", "meaning"),
        (
            (f"`{name}`", type_words(part), default_words(cls, name), meaning(cls, name))
            for name, part in sorted(schema["properties"].items(), key=lambda item: item[0] != "kind")
            if name not in shared
        ),
    )


def augmentations() -> Iterator[str]:
    """Every augmentation with its options and short form."""
    yield "### Augmentations: `data.augment`, `teacher.augment`"
    yield ""
    yield ABOUT_AUGMENTATIONS
    rows = []
    own = {**views.TENSOR_AUGMENTS, **views.MIX_AUGMENTS}
    for name in (*own, *views.TORCHVISION_AUGMENTS, *views.CROPS):
        if name in own:
            options = inspect.signature(own[name]).parameters.values()
            takes = ", ".join(f"`{o.name}` ({o.default})" for o in options if o.name != "stream")
            what = inspect.getdoc(own[name]) or ""
        else:
            takes = "its own"
            what = f"`transforms.v2.{views.TORCHVISION_AUGMENTS.get(name, 'RandomResizedCrop')}`"
            if name in views.CROPS:
                what += " on the image file, in place of resizing; must come first"
        try:
            (first,) = views.parse_augment({name: 1})[1]
            short = f"`{{{name}: {first.upper()}}}`"
        except ConfigError:
            short = "–"
        rows.append((f"`{name}`", " ".join(what.replace("``", "`").rstrip(".").split()), takes, short))
    yield from table(("name", "what it does", "options (default)", "short form"), rows)


def models() -> Iterator[str]:
    """The small networks and their options."""
    yield "### Models of our own"
    yield ""
    fixed = {"classes", "channels", "size"}
    yield from table(
        ("name", "what it is", "options (default)"),
        (
            (
                f"`{name}`",
                (inspect.getdoc(cls) or "").splitlines()[0].rstrip("."),
                ", ".join(
                    f"`{o.name}` ({json.dumps(o.default)})"
                    for o in inspect.signature(cls).parameters.values()
                    if o.name not in fixed
                ),
            )
            for name, cls in ZOO.items()
        ),
    )
    yield ABOUT_MODELS


def optimizers() -> Iterator[str]:
    """The optimizers and their options."""
    yield "Options in addition to `lr` and `weight_decay`, with torch's defaults:"
    yield ""
    yield from table(
        ("kind", "class", "options"),
        (
            (f"`{kind}`", f"`torch.optim.{optim.OPTIMIZERS[kind].__name__}`", ", ".join(f"`{o}`" for o in options))
            for kind, options in config.OPTIMIZERS.items()
        ),
    )


def schedules() -> Iterator[str]:
    """The schedules and their options."""
    yield "The learning rate changes after every optimizer step. Defaults of options are in brackets."
    yield ""
    yield from table(
        ("kind", "what it does", "options"),
        (
            (f"`{kind}`", SCHEDULES[kind], ", ".join(f"`{o}`" for o in options) or "–")
            for kind, options in config.SCHEDULES.items()
        ),
    )


def logit_losses() -> Iterator[str]:
    """What `soft` can name."""
    yield "### Losses on logits: `soft`"
    yield ""
    yield from table(
        ("soft", "default T", "options (default)"),
        (
            (
                f"`{name}`",
                "none" if entry.temperature is None else f"{entry.temperature:g}",
                options_of(name, entry.options),
            )
            for name, entry in LOGIT_LOSSES.items()
        ),
    )
    yield from option_meanings(LOGIT_LOSSES)
    yield "Published weights: `alpha: 1, hard: 1` for `dkd` and `dist`; `alpha: 9, hard: 1` at T = 2 for `kd` with"
    yield "`standardize: true`. The results of the `dkd` paper include a warm-up of the loss weight over 20 epochs,"
    yield "which tutelage does not have."
    yield ""


PLACES = {
    "activations": "maps before the last activation of each resolution that both have",
    "embedding": "what goes into the output heads",
    "last": "the last feature map of both",
    "named": "none: `pairs` must be given",
    "stages": "the last maps of each resolution that both have",
}


def feature_losses() -> Iterator[str]:
    """What `loss` can name."""
    yield "### Losses on features: `loss`"
    yield ""
    student, teacher = (2, 8, 8, 8), (2, 16, 8, 8)
    rows = []
    for name, entry in FEATURE_LOSSES.items():
        weight = entry.weight(student, teacher, entry.options()) if callable(entry.weight) else entry.weight
        cell = f"{weight:.4g}" + (" for 16 channels of 8x8" if callable(entry.weight) and name != "pkt" else "")
        rows.append((f"`{name}`", PLACES[entry.pairs], options_of(name, entry.options), f"{cell} ({entry.source})"))
    yield from table(("loss", "`pairs: auto`", "options (default)", "default weight (source)"), rows)
    yield from option_meanings(FEATURE_LOSSES)
    yield ABOUT_FEATURE_LOSSES


def option_meanings(losses_by_name: Mapping[str, Any]) -> Iterator[str]:
    """The table of all options of losses."""
    rows = []
    for name, entry in losses_by_name.items():
        properties = entry.options.model_json_schema().get("properties", {})
        rows += [(f"`{name}`", f"`{o}`", type_words(s), meaning(entry.options, o)) for o, s in properties.items()]
    yield from table(("loss", "option", "value", "meaning"), rows)


def options_of(name: str, section: type[LossOptions]) -> str:
    """Options of a loss with their defaults: the section's, else the function's."""
    function = inspect.signature(getattr(losses, name)).parameters

    def default(option: str) -> str:
        own = section.model_fields[option].default
        if own is None and option not in function:
            return "see below"
        return json.dumps(function[option].default if own is None else own)

    return ", ".join(f"`{option}` ({default(option)})" for option in section.model_fields) or "–"


ABOUT_INFERENCE = """\
With `members`, each member can have its own `inference`, without `overlap` and `process`. It takes missing keys
from `teacher.inference`. If training images are not augmented and the teacher outputs fit into memory, they are
kept there: the teacher runs once for each image, and `overlap` and `process` have no effect.
"""

ABOUT_ENSEMBLES = """\
```yaml
data: {source: imagefolder, path: data/streets, route: folder}    # train/CLASS/day/1.png, train/CLASS/night/2.png
teacher:
  members:
    - {model: "timm:resnet50", checkpoint: day.safetensors}
    - {model: "timm:resnet50", checkpoint: night.safetensors}
    - {model: convnet, train: {epochs: 30}}                       # trained first, in models/teacher-2
  combine: probabilities      # or logits
  weights: [2, 2, 1]          # or learned, without route
  route: {day: [0, 2], night: [1, 2]}
```

- `combine: probabilities`: the student's method gets the log of the mean as logits. At T = 1 the soft labels are that
  mean; at a higher `temperature` the method softens these logits as usual. With `temperature: 4` and
  `average_temperature: 4` the soft labels are the mean of the members' distributions at T = 4.
- `combine: logits`: the mean of logits is the normalised geometric mean of the probabilities.
- A hidden state comes from one member: `pairs: [{student: stages.1, teacher: 0.stages.1}]`. `auto` is not possible.
- The summary and the report have the weight and the accuracy of each member (with `route`, on the images that it
  teaches).
"""


def verbatim(text: str) -> Callable[[], Iterator[str]]:
    """A part of the page that is only text."""
    return lambda: iter([text])


ABOUT_SEARCH = """\
```yaml
search:
  space:
    method.temperature: {low: 1, high: 20, log: true}
    method.alpha: {low: 0.1, high: 1.0}
    train.optimizer.lr: {low: 1e-3, high: 1e-1, log: true}
    train.batch_size: {low: 32, high: 128, step: 32}
    method.soft: [kd, dist]
  trials: 40
```

`tutelage search RECIPE --trials 40 --workers 2 --key method.temperature=1:20:log --key method.soft=kd,dist`

- A trial trains the distilled student once for each seed of the recipe. Trials are compared by the validation
  accuracy after the last epoch, as a mean over seeds. No trial reads the test split. At the end, the original
  recipe and the chosen recipe run once in full. Their test figures are in `search.json` and `search.html`.
- If the recipe's own values are in the search space, they are the first trial. Other values are chosen only if they
  are better.
- The teacher is trained once, before all trials. A search cannot change the teacher (`teacher.model`, `teacher.train`
  ...) or the evaluation (`seeds`, `data.validation`, `data.split_seed` ...).
- Before the first trial, both ends of each range and all values are checked, as in a recipe and by a dry run.
- Optuna's TPE sampler suggests the values; its random numbers depend on the search seed, the trial number and the
  finished trials. With one worker, a search that was killed and continued with `--resume` gives the same result.
- The folder contains `search.json`, `search.html`, `best.yaml` (a recipe for `tutelage run`), `default/` and
  `chosen/` (run directories), `teacher/`, `trials/`, and optuna's `search.journal`. `--resume` with more `--trials`
  continues it.
"""


AFTER = {
    "teacher": verbatim(ABOUT_ENSEMBLES),
    "teacher.inference": verbatim(ABOUT_INFERENCE),
    "method: kind: logit": logit_losses,
    "method: kind: feature": feature_losses,
    "data": augmentations,
    "student": models,
    "search": verbatim(ABOUT_SEARCH),
    "train.optimizer": optimizers,
    "train.schedule": schedules,
}


def page() -> str:
    """The whole page."""
    example = (PAGE.parents[1] / "recipes" / "digits.yaml").read_text(encoding="utf-8")
    lines = [INTRO.format(example=example), "## The recipe", "", *keys(config.Recipe)]
    for name, cls in SECTIONS.items():
        lines += [f"## `{name}`", "", *(inspect.getdoc(cls) or "").replace("``", "`").splitlines(), ""]
        lines += keys(cls)
        lines += AFTER[name]() if name in AFTER else []
    return "\n".join(lines).rstrip() + "\n"


SHORT: dict[str, dict[str, Any]] = {
    "Recipe.data": {"type": "string"},
    "Recipe.teacher": {"type": "string"},
    "Recipe.student": {"type": "string"},
    "Recipe.method": {"type": "string"},
    "Recipe.workflow": {"type": "string"},
    "TrainConfig.optimizer": {"type": "string"},
    "TrainConfig.schedule": {"type": "string"},
    "TeacherConfig.cache": {"type": ["boolean", "string"]},
    "TeacherConfig.members": {"type": "array", "items": {"type": ["string", "object"]}, "minItems": 2},
    "ByotOptions.exits": {"type": "string"},
    "FeatureOptions.pairs": {"type": "string"},
    "SearchConfig.space": {"type": "object"},
    "AssistantChainConfig.assistants": {"type": ["string", "array"]},
    "MutualOptions.peers": {"type": "integer", "minimum": 1},
    "StudentConfig.lora": {"type": "integer", "minimum": 1},
}
"""Short forms of sections. The recipe is expanded before the classes check it."""


def schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors: every key with its meaning, and the short forms.

    It checks types, names and ranges. Only `tutelage` checks combinations of keys.
    """
    document = config.Recipe.model_json_schema()
    classes = {cls.__name__: cls for cls in (config.Recipe, *SECTIONS.values())}
    for name, part in [("Recipe", document), *document["$defs"].items()]:
        for key, field in part.get("properties", {}).items():
            if name in classes:
                field["description"] = meaning(classes[name], key)
            if one_of := field.pop("oneOf", None):
                field["anyOf"] = one_of
            for nested in field.get("anyOf", []):
                if one_of := nested.pop("oneOf", None):
                    nested["anyOf"] = one_of
                nested.pop("discriminator", None)
            field.pop("discriminator", None)
            by_name = {"type": "string"} if key == "layers" and name != "StudentConfig" else None
            if short := SHORT.get(f"{name}.{key}", by_name):
                whole = {k: field.pop(k) for k in list(field) if k not in ("description", "default", "title")}
                field["anyOf"] = [short, *(whole["anyOf"] if whole.keys() == {"anyOf"} else [whole])]
        known = ("kind", "name", "method", "data", "student")  # all of these can be left out somewhere
        part["required"] = [key for key in part.get("required", []) if key not in known]
    document["properties"]["seed"] = {"type": "integer", "minimum": 0, "description": "Short for `seeds` of one."}
    document["anyOf"] = [{"required": ["data", "student"]}, {"required": ["generate"]}, {"required": ["judge"]}]
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A recipe of tutelage"}
    return {**about, **{k: v for k, v in document.items() if k not in about}}


def schema_text() -> str:
    """The text of the schema's file."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    SCHEMA.write_text(schema_text(), encoding="utf-8")
