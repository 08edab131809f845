"""``tutelage cache``: precomputes teacher outputs; verifies, inspects and compacts a cache."""

import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from tutelage.config import CacheConfig, Recipe
from tutelage.data import SequentialBatches
from tutelage.engine import build_accelerator
from tutelage.errors import CacheError, CapabilityError, ConfigError, Interrupted
from tutelage.experiment.caching import open_recipe_cache
from tutelage.experiment.checks import check_output, check_teachers, check_tokenizers, warn_of_precision
from tutelage.experiment.prepare import build_teacher, model_of, needs_teacher, prepare_student_and_method
from tutelage.experiment.recipe_source import load_data, recipe_spec
from tutelage.experiment.teacher_setup import build_live_teacher, open_remote_teacher
from tutelage.interrupts import catch_interrupts
from tutelage.progress import Terminal
from tutelage.teachers.cache import compact_cache, inspect_cache, verify_cache


@dataclass(frozen=True)
class CacheResult:
    """A full cache: its folder, its rows, those that this process computed now, and the seconds that it took."""

    path: Path
    rows: int
    computed: int
    seconds: float


def fill_cache(recipe: Recipe, *, out: str | Path | None = None, terminal: Terminal | None = None) -> CacheResult:
    """Compute the teacher outputs for every view of every training sample once, and keep them on disk.

    Existing rows are not computed again: call an interrupted one again to continue it. Several processes share the
    work.

    Args:
        out: the folder of the cache. Default: the recipe's ``teacher.cache.path``, or the one that its runs use.
    """
    recipe = _with_cache(recipe, out)
    accelerator = build_accelerator(recipe.train.precision, [])
    terminal = (terminal or Terminal()).only_on(accelerator.is_main_process)
    warn_of_precision(accelerator, terminal)
    data = load_data(recipe, terminal)
    spec = recipe_spec(recipe, data)
    model = build_teacher(spec)
    teacher = None
    if model is not None:
        check_teachers(spec, accelerator.device, model)
        teacher = build_live_teacher(spec, model, accelerator.device)
    student = spec.source.build_student(recipe.seeds[0])
    classes = check_output(
        spec, accelerator.device, student, "student"
    )  # the size of a vocabulary is known from the model only
    _, method = prepare_student_and_method(spec, student, model_of(teacher), recipe.seeds[0])
    check_tokenizers(spec, method)
    if not needs_teacher(method):
        raise CapabilityError(
            f"method {recipe.method.kind} does not use teacher outputs, so there is nothing to cache",
            where="method",
            remedy="use a method with a teacher, such as method=logit",
        )
    start = time.monotonic()
    with (
        catch_interrupts(terminal.say) as should_stop,
        open_remote_teacher(spec, terminal, method, classes) as remote,
    ):
        source = teacher or remote
        assert source is not None
        with open_recipe_cache(recipe, data, source, classes, method, accelerator) as cache, accelerator.autocast():
            terminal.say(f"cache: {cache.folder}, {len(cache.reader):,} rows known")
            views: list[int | None] = list(range(recipe.data.views or 1)) if data.train.is_augmented else [None]
            for view in views:
                what = "teacher" if view is None else f"teacher, view {view + 1} of {len(views)}"
                batches = SequentialBatches(
                    data.train, recipe.train.batch_size, workers=recipe.data.workers, view=view
                )
                for i, batch in enumerate(terminal.iterate(batches, what)):
                    if i % accelerator.num_processes == accelerator.process_index:
                        cache.fill(batch)
                    if should_stop():
                        raise Interrupted(
                            "stopped; the computed rows are kept", remedy="run the same command again to continue"
                        )
        accelerator.wait_for_everyone()
        cache.reader.refresh()
        return CacheResult(cache.folder, len(cache.reader), cache.computed_rows, time.monotonic() - start)


def _with_cache(recipe: Recipe, out: str | Path | None) -> Recipe:
    if recipe.teacher is None:
        raise ConfigError("the recipe has no teacher, so there are no outputs to cache", where="teacher",
                          remedy="add 'teacher'")  # fmt: skip
    if any(member.train is not None for member in recipe.teacher.each):
        raise CapabilityError(
            "the teacher has no weights yet; a cache needs a trained teacher",
            where="teacher",
            remedy="give teacher.checkpoint; or use `tutelage run` with teacher.cache=true, which trains the "
            "teacher and fills the cache",
        )
    config = recipe.teacher.cache or CacheConfig()
    if out is not None:
        config = config.model_copy(update={"path": str(out)})
    if recipe.data.augment and recipe.data.views is None:
        raise ConfigError(
            "without a number of views every epoch has new augmentations, which a cache cannot store",
            where="data.views",
            remedy="set a number of views: data.views=10",
        )
    teacher = recipe.required_teacher.model_copy(update={"cache": config})
    return recipe.model_copy(update={"teacher": teacher})


def cache_verification(folder: Path) -> str:
    """One line for an intact cache."""
    faults = verify_cache(folder, Terminal().iterate)
    if faults:
        raise CacheError(f"{len(faults)} faults\n" + "\n".join(faults), where=str(folder))
    facts = inspect_cache(folder)
    return f"{folder}: intact; {facts['rows']:,} rows in {facts['shards']} shards, {facts['bytes']:,} bytes"


def cache_description(folder: Path) -> str:
    """What a cache keeps and what it was made from, as YAML."""
    return yaml.safe_dump(inspect_cache(folder), sort_keys=False).rstrip()


def cache_compaction(folder: Path) -> str:
    """Merge the shards of a cache, and describe the change."""
    now = compact_cache(folder, Terminal().iterate)
    return (
        f"{folder}: {now['shards_before']} shards of {now['bytes_before']:,} bytes are now {now['shards']} of "
        f"{now['bytes']:,}; {now['rows']:,} rows"
    )
