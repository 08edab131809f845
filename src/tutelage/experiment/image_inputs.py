"""How the models of a recipe read images: as their own files say, and as the recipe says otherwise."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from tutelage.config import DataConfig, ModelConfig, Recipe
from tutelage.data import ImageData, load_images
from tutelage.data.preprocessing import differences
from tutelage.errors import ConfigError, TutelageError, at_key
from tutelage.export.image_files import KnownPreprocessing, known_preprocessing
from tutelage.progress import Terminal


def preprocessing_of(config: ModelConfig, where: str) -> KnownPreprocessing | None:
    """:func:`known_preprocessing` of a recipe's model; errors name its key."""
    try:
        return known_preprocessing(config.model, config.options, config.checkpoint)
    except TutelageError as error:
        error.where = error.where or f"{where}.model"
        raise


def files_of_models(recipe: Recipe) -> list[KnownPreprocessing | None]:
    """What the files of the student and of each member of the teacher say about their images."""
    return [preprocessing_of(config, where) for where, config in _models(recipe)]


def _models(recipe: Recipe) -> list[tuple[str, ModelConfig]]:
    """The key and the section of the student and of each member of the teacher."""
    teacher = recipe.teacher
    members = [] if teacher is None or teacher.endpoint is not None else teacher.each
    names = ["teacher"] if len(members) == 1 else [f"teacher.members.{i}" for i in range(len(members))]
    return [("student", recipe.student), *zip(names, members, strict=True)]


def load_recipe_images(recipe: Recipe, terminal: Terminal, say: Callable[[str], None] = lambda _: None) -> ImageData:
    """The images of a recipe, as each of its models reads them; ``say`` receives what is not read or has no label."""
    config = recipe.data
    assert isinstance(config, DataConfig)
    known = files_of_models(recipe)
    own = [None if files is None else files.preprocessing for files in known]
    fields = config.model_dump(exclude={"kind", "workers", "views"})
    with at_key("data.source" if config.path is None else "data.path"):
        augment = None if recipe.teacher is None else recipe.teacher.augment
        data = load_images(
            **fields, teacher_augment=augment, progress=terminal.iterate, student=own[0], teachers=own[1:], say=say
        )
    for number, peer in enumerate(getattr(recipe.method, "peers", None) or ()):
        if isinstance(peer, ModelConfig):
            _check_peer(data, preprocessing_of(peer, "method.peers"), config, f"method.peers.{number}")
    return replace(data, notes=list(_notes(data, [who for who, _ in _models(recipe)], known)))


def _check_peer(data: ImageData, files: KnownPreprocessing | None, config: DataConfig, where: str) -> None:
    """Raise :class:`ConfigError` if a peer's files differ from the student's preprocessing, which it gets."""
    given = {k: v for k in ("size", "crop", "mean", "std") if (v := getattr(config, k)) is not None}
    changed = [] if files is None else differences(files.preprocessing.override(given), data.train.preprocessing)
    if files is not None and changed:
        raise ConfigError(
            f"a peer gets the student's images, but {files.source} has {'; '.join(changed)} (in brackets: the "
            "student's values)",
            where=where,
            remedy="use a peer with the student's preprocessing, or set data.size, data.crop, data.mean and data.std",
        )


def _notes(data: ImageData, names: list[str], known: list[KnownPreprocessing | None]) -> Iterator[str]:
    """A line for each model with files, and what the recipe changes."""
    used = [data.train.preprocessing, *data.train.teachers]
    for who, files, own in zip(names, known, used, strict=True):
        if files is not None:
            changed = differences(own, files.preprocessing)
            recipe = f", but the recipe sets {'; '.join(changed)} (in brackets: the file's)" if changed else ""
            yield f"the {who} uses the preprocessing of {files.source}{recipe}"
