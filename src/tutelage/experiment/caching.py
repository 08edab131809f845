"""``tutelage cache``: the teacher's word on disk, and all that it depends on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from tutelage.config import CacheConfig, DataConfig, Recipe
from tutelage.data import Batch, Data, SequentialBatches
from tutelage.engine import Accelerator, make_accelerator, precision_here
from tutelage.errors import CacheError, CapabilityError, ConfigError, Interrupted
from tutelage.experiment.measure import fingerprint
from tutelage.experiment.teachers import ModelTeacher, as_it_runs
from tutelage.methods import Method
from tutelage.progress import Terminal
from tutelage.signals import stopping
from tutelage.students import feature_shapes
from tutelage.taps import output_head
from tutelage.teachers import CachedTeacher, Layout, RemoteTeacher
from tutelage.teachers.cache import compact_cache, inspect_cache, verify_cache

FOLDER = Path("runs") / "cache"


@dataclass(frozen=True)
class Filled:
    """A cache that holds every row of a recipe's training data.

    Attributes:
        path: its folder.
        rows: that it holds.
        computed: rows that the teacher was asked for this time, by this process.
        seconds: that took.
    """

    path: Path
    rows: int
    computed: int
    seconds: float


def open_cache(
    recipe: Recipe,
    data: Data,
    teacher: ModelTeacher | RemoteTeacher,
    classes: int,
    method: Method,
    accelerator: Accelerator,
) -> CachedTeacher:
    """The cache that a recipe asks for, new or as it is.

    Raises:
        CapabilityError: the method needs what no cache keeps.
        CacheError: it was made from something else, or is damaged.
    """
    config = recipe.required_teacher.cache
    assert config is not None
    example = data.test.fetch(torch.zeros(1, dtype=torch.int64))
    made_from = provenance(recipe, data, teacher)
    if isinstance(teacher, RemoteTeacher):
        layout = Layout("topk", classes, config.dtype, teacher.k, temperatures=(1.0,), tokens=True)
        return _cached(config, recipe.name, made_from, layout, teacher, accelerator)
    return _opened(config, recipe.name, made_from, example, teacher, classes, method, accelerator)


def open_own_cache(
    config: CacheConfig,
    rest: Callable[[], dict[str, Any]],
    example: Callable[[], Batch],
    teacher: ModelTeacher,
    classes: int,
    method: Method,
    accelerator: Accelerator,
) -> CachedTeacher:
    """The cache of a teacher's word on a caller's own data, new or as it is.

    Args:
        config: what is kept, and where.
        rest: finds what a row depends on beside the teacher, by field.
        example: a batch of a sample or more.
        teacher: asked for what is missing.
        classes: how many it scores.
        method: needs what is kept.
        accelerator: of this process.

    Raises:
        CapabilityError: the method or the data needs what no cache keeps.
        CacheError: it was made from something else, or is damaged.
    """
    one = example().rows(0, 1)
    runs = as_it_runs(teacher)
    made_from = {"teacher": fingerprint(teacher.model) | ({"runs": runs} if runs else {}), **rest()}
    return _opened(config, "distill", made_from, one, teacher, classes, method, accelerator)


def _opened(
    config: CacheConfig,
    name: str,
    made_from: dict[str, Any],
    example: Batch,
    teacher: ModelTeacher,
    classes: int,
    method: Method,
    accelerator: Accelerator,
) -> CachedTeacher:
    from tutelage.experiment.teacher_setup import all_needs

    needs = all_needs(method)
    if needs.head and config.keep != "hidden" and not method.takes_sparse:
        raise CapabilityError(
            f"the method needs the teacher's output head, and the cache keeps {config.keep} logits",
            remedy="set teacher.cache.keep: hidden, or leave the cache out",
        )
    tokens = example.labels.ndim == 2
    shown, leading = example.for_teacher(), 2 if tokens else 1
    shapes = {tap: shape[leading:] for tap, shape in feature_shapes(teacher.model, shown, needs.hidden).items()}
    usual = [] if needs.temperature is None else [needs.temperature]
    layout = Layout(
        keep=config.keep if needs.logits or needs.head else None,
        classes=classes,
        dtype=config.dtype,
        k=min(config.k, classes),
        draws=config.draws,
        head=min(config.head, classes - 1),
        temperatures=() if config.keep in ("dense", "hidden") else tuple(config.temperatures or usual),
        hidden=shapes,
        power=config.power,
        width=output_head(teacher.model).in_features if config.keep == "hidden" else 0,
        tokens=tokens,
    )
    return _cached(config, name, made_from, layout, teacher, accelerator)


def _cached(
    config: CacheConfig,
    name: str,
    made_from: dict[str, Any],
    layout: Layout,
    teacher: ModelTeacher | RemoteTeacher,
    accelerator: Accelerator,
) -> CachedTeacher:
    path = Path(config.path) if config.path is not None else FOLDER / _name(name, made_from, layout)
    return CachedTeacher(path, layout, made_from, teacher, device=accelerator.device, rank=accelerator.process_index)


def provenance(recipe: Recipe, data: Data, teacher: ModelTeacher | RemoteTeacher) -> dict[str, Any]:
    """Everything that a row of the cache depends on, as JSON."""
    if isinstance(teacher, RemoteTeacher):  # where it is, and how much it reads, is of no account
        who: dict[str, Any] = {"served": {k: v for k, v in teacher.facts.items() if k != "longest"}}
    else:
        runs = as_it_runs(teacher)
        if data.route_names:
            runs["routes"] = [recipe.data.route, data.route_names]
        who = fingerprint(teacher.model) | ({"runs": runs} if runs else {})
    return {
        "teacher": who,
        "data": {
            "source": recipe.data.source,
            "options": {k: str(v) for k, v in recipe.data.options.items()},
            **(
                {"image_column": recipe.data.image_column}
                if isinstance(recipe.data, DataConfig)
                else {"task": recipe.data.task, **data.provenance()}
            ),
        },
        "preprocessing": data.preprocessing() | chat_template(getattr(data, "tokenizer", None)),
        "augment": recipe.data.augment,
        "views": recipe.data.views if data.train.is_augmented else None,
        # an image that is mixed with others depends on which there are
        "rows": hashlib.sha256(data.train.ids.numpy().tobytes()).hexdigest()[:16]
        if data.train.mix_augments
        else None,
        "precision": precision_here(recipe.train.precision),
    }


def chat_template(tokenizer: Any) -> dict[str, str]:
    """A digest of what lays out a conversation, where the tokenizer has that."""
    found = getattr(tokenizer, "chat_template", None)
    return {} if not found else {"chat_template": hashlib.sha256(str(found).encode()).hexdigest()[:16]}


def _name(name: str, made_from: dict[str, Any], layout: Layout) -> str:
    text = json.dumps([made_from, layout.to_dict()], sort_keys=True)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def fill(recipe: Recipe, *, out: str | Path | None = None, terminal: Terminal | None = None) -> Filled:
    """Ask a recipe's teacher once for every view of every training image, and keep it.

    Rows that are there already are not computed again: an interrupted one is simply called again. Several processes
    share the work.

    Args:
        recipe: its teacher has weights.
        out: the folder of the cache. Default: the recipe's ``teacher.cache.path``, or the one that its runs use.
        terminal: where progress is shown.

    Raises:
        CapabilityError: the teacher has no weights yet.
        CacheError: the folder's cache was made from something else, is damaged, or cannot be written.
        Interrupted: SIGTERM or Ctrl-C; what was computed is kept.
    """
    from tutelage.experiment.checks import check_output, check_teachers, warn_of_precision
    from tutelage.experiment.run import comparison, load_data
    from tutelage.experiment.spec import prepare_student_and_method
    from tutelage.experiment.teacher_setup import as_taught, is_taught, open_remote_teacher

    if recipe.teacher is None:
        raise ConfigError(
            "the recipe has no teacher, and a cache is of what one says",
            where="teacher",
            remedy="add 'teacher'",
        )
    if any(member.train is not None for member in recipe.teacher.each):
        raise CapabilityError(
            "the teacher has no weights yet, and a cache is of one that is trained",
            where="teacher",
            remedy="`tutelage run` trains it, and with teacher.cache=true keeps its word on the way; or give "
            "teacher.checkpoint",
        )
    recipe = _with_cache(recipe, out)
    terminal = terminal or Terminal()
    accelerator = make_accelerator(recipe.train.precision, [])
    terminal.speaks = terminal.speaks and accelerator.is_main_process
    terminal.live = terminal.live and accelerator.is_main_process
    warn_of_precision(accelerator, terminal)
    data = load_data(recipe, terminal)
    c = comparison(recipe, data)
    teacher: ModelTeacher | None = None
    if c.teacher is not None:
        untrained = c.teacher()
        check_teachers(c, accelerator.device, untrained)
        teacher = as_taught(c, untrained, accelerator.device)
    student = c.student(recipe.seeds[0])
    classes = check_output(c, accelerator.device, student, "student")  # of a vocabulary the data knows no number
    _, method = prepare_student_and_method(c, student, None if teacher is None else teacher.model, recipe.seeds[0])
    if not is_taught(method):
        raise CapabilityError(
            f"method {recipe.method.kind} asks the teacher for nothing that a cache could keep",
            where="method",
            remedy="a cache is for methods that a teacher teaches, such as method=logit",
        )
    views: list[int | None] = list(range(recipe.data.views or 1)) if data.train.is_augmented else [None]
    start = time.monotonic()
    with stopping(terminal.say) as should_stop, open_remote_teacher(c, terminal, method, classes) as remote:
        asked = teacher or remote
        assert asked is not None
        opened = open_cache(recipe, data, asked, classes, method, accelerator)
        with opened as cache, accelerator.autocast():
            terminal.say(f"cache: {cache.folder}, {len(cache.reader):,} rows known")
            for view in views:
                batches = SequentialBatches(
                    data.train, recipe.train.batch_size, workers=recipe.data.workers, view=view
                )
                what = "teacher" if view is None else f"teacher, view {view + 1} of {len(views)}"
                for i, batch in enumerate(terminal.iterate(batches, what)):
                    if i % accelerator.num_processes == accelerator.process_index:
                        cache.fill(batch)
                    if should_stop():
                        raise Interrupted(
                            "stopped; what was computed is kept", remedy="the same command again goes on from there"
                        )
            computed = cache.computed_rows
        accelerator.wait_for_everyone()
        cache.reader.refresh()
    return Filled(cache.folder, len(cache.reader), computed, time.monotonic() - start)


def _with_cache(recipe: Recipe, out: str | Path | None) -> Recipe:
    """The recipe with a cache, in the folder ``out`` where one is given; checked again."""
    assert recipe.teacher is not None
    config = recipe.teacher.cache or CacheConfig()
    if out is not None:
        config = config.model_copy(update={"path": str(out)})
    if recipe.data.augment and recipe.data.views is None:
        raise ConfigError(
            "the recipe augments its images anew in every epoch, and a cache keeps a row for each view",
            where="data.views",
            remedy="set how many views there are: data.views=10",
        )
    teacher = recipe.required_teacher.model_copy(update={"cache": config})
    return recipe.model_copy(update={"teacher": teacher})


# A cache that is there --------------------------------------------------------------------------------


def verified(folder: Path) -> str:
    """One line where a cache is whole.

    Raises:
        CacheError: it is not; names every fault.
    """
    terminal = Terminal()
    faults = verify_cache(folder, terminal.iterate)
    if faults:
        raise CacheError(f"{len(faults)} faults\n" + "\n".join(faults), where=str(folder))
    known = inspect_cache(folder)
    return f"{folder}: whole; {known['rows']:,} rows in {known['shards']} shards, {known['bytes']:,} bytes"


def described(folder: Path) -> str:
    """What a cache keeps and what it was made from, as YAML.

    Raises:
        CacheError: no cache, or a damaged one.
    """
    return yaml.safe_dump(inspect_cache(folder), sort_keys=False).rstrip()


def compacted(folder: Path) -> str:
    """Join the shards of a cache, and say what that changed.

    Raises:
        CacheError: no cache, a damaged one, or no room.
    """
    now = compact_cache(folder, Terminal().iterate)
    return (
        f"{folder}: {now['shards_before']} shards of {now['bytes_before']:,} bytes are now {now['shards']} of "
        f"{now['bytes']:,}; {now['rows']:,} rows"
    )
