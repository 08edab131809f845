"""The caller's loaders of ``tutelage.distill``, before anything is trained."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tutelage.data import Batch
from tutelage.data.batch import has_labels
from tutelage.data.own_loaders import as_loader, first_item
from tutelage.errors import DataError
from tutelage.methods import Method


def read_loaders(batch_size: int, **given: Any) -> tuple[list[Any], list[str]]:
    """Loaders for what the caller gives, and notes about those that were made."""
    loaders, notes = [], []
    for name, one in given.items():
        loader, note = (
            (None, None) if one is None else as_loader(one, name, batch_size, shuffle=name == "train_loader")
        )
        loaders.append(loader)
        notes += [] if note is None else [note]
    return loaders, notes


def check_like_evaluation(loader: Any, to_batch: Callable[[Any], Batch], example: Batch) -> None:
    """Raise :class:`DataError` if the first training batch has other inputs or label shapes than the evaluation."""
    batch = to_batch(first_item(loader, "train_loader"))
    own, theirs = (set(x.inputs) if isinstance(x.inputs, dict) else None for x in (batch, example))
    if own is not None and theirs is not None and own - theirs:
        raise DataError(
            f"train_loader yields the inputs {', '.join(sorted(own))}, and eval_data {', '.join(sorted(theirs))}",
            remedy="yield the same inputs from both, those that the models take",
        )
    if batch.task == example.task and batch.labels.ndim > example.labels.ndim:
        raise DataError(
            f"the labels of train_loader are {tuple(batch.labels.shape)}, those of eval_data have "
            f"{example.labels.ndim} dimension{'s' if example.labels.ndim > 1 else ''}",
            remedy="yield labels of one shape from both; labels.squeeze(1) makes [B] of [B, 1]",
        )


def is_labelled(loader: Any, to_batch: Callable[[Any], Batch], own: bool, method: Method) -> bool:
    """Whether a loader yields labels; raises :class:`DataError` if it does not and the method needs them."""
    raw = first_item(loader, "train_loader")
    has_place = not own or has_labels(raw)
    if has_place:
        with torch.random.fork_rng(devices=[]):  # the first batch answers, unless all of its labels are -100
            if any(bool(to_batch(one).labelled().any()) for one in itertools.chain([raw], loader)):
                return True
    counts = method.counts(to_batch(raw))
    terms = [name for name, count in counts.items() if method.weights[name] and not int(count)]
    if method.needs is not None and not terms:
        return False
    given = (
        "every label of train_loader is -100"
        if has_place
        else f"the batch has no key 'labels', only {', '.join(map(str, raw))}"
        if isinstance(raw, Mapping)
        else ("train_loader yields inputs without labels")
    )
    needs = f"the term {terms[0]!r} of its loss" if terms else "it"
    raise DataError(
        f"{given}, and {type(method).__name__} learns from labels: {needs} needs them",
        remedy="learn from the teacher alone, as with method=LogitMethod(alpha=1.0); or yield (inputs, labels), or "
        "pass to_batch=, a function that makes a Batch",
    )
