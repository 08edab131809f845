"""Tries before training what a run does after it: saving its models, loading them, and generating samples."""

import copy
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.errors import CapabilityError, RunDirectoryError, TutelageError, first_line
from tutelage.experiment.spec import ExperimentSpec, RunContext
from tutelage.files import TEMPORARY_PREFIX, wrap_write_errors
from tutelage.methods import Method
from tutelage.models import load_model, load_weights, save_model
from tutelage.models.pretrained import SentenceEncoder
from tutelage.students import ReusedHead, is_quantisation_aware, to_float_model
from tutelage.students.config_probing import (
    VOCABULARY_SIZE,
    config_for_layers,
    random_model,
    weight_shapes,
    with_vocabulary_size,
)
from tutelage.students.layer_selection import find_layer_stack
from tutelage.students.lora import has_adapters
from tutelage.students.sampling import sample_completions

LARGE = 5_000_000
"""Parameters above which a few layers with a small vocabulary are saved in place of the model."""


def check_saves(
    spec: ExperimentSpec, student: nn.Module, initial: nn.Module, method: Method, teacher: nn.Module | None,
    ctx: RunContext | None = None,
) -> None:  # fmt: skip
    """Save each model that the run trains, and load it as the run and later commands do.

    Args:
        spec: the experiment.
        student: the student of the distilled arm.
        initial: what the method made it of.
        method: its peers are saved too.
        teacher: the teacher's model, or an ensemble; only members that are trained first are saved.
        ctx: the files are written in its run directory, and removed. Default: in the system's temporary folder.

    Raises:
        CapabilityError: what is loaded is not what was saved, or saving, loading or generating fails.
    """
    card = dict(spec.student_card)
    models = {"student": (student, card | ({"reused_head": student.card} if isinstance(student, ReusedHead) else {}))}
    if spec.baseline and student is not initial:  # which the method may have taken apart
        models["baseline student"] = (spec.source.build_student(spec.seeds[0]), card)
    for options, (name, peer) in zip(method.peers, method.auxiliary_models(student).items(), strict=False):
        models[name] = (peer, card | spec.source.peer_card(options))
    if teacher is not None and spec.teacher is not None:
        members = [teacher] if spec.teacher.ensemble is None else list(teacher.children())
        for member, model in zip(spec.teacher.members, members, strict=True):
            if member.training is not None:
                models[member.name] = (model, dict(member.card))
    for name, (model, one) in models.items():
        cannot = f"the {name}, a {type(model).__name__}, cannot be loaded after it is saved"
        with _refusal(cannot), torch.random.fork_rng(devices=[]):  # a model that is built draws random weights
            _check_model(model, one, None if ctx is None else ctx.run.path)
    if spec.evaluation.tokenizers is not None and spec.evaluation.samples.generations:
        _check_generates(student)


@contextmanager
def _refusal(what: str, remedy: str | None = None) -> Iterator[None]:
    try:
        yield
    except RunDirectoryError:  # no space, or no permission
        raise
    except Exception as error:
        text = error.what if isinstance(error, TutelageError) else first_line(error)
        raise CapabilityError(
            f"{what}: {text[:300]}",
            remedy=remedy or "use a model of another family, or another version of the library that defines it",
        ) from error


def _check_model(model: nn.Module, card: Mapping[str, Any], folder: Path | None) -> None:
    _check_config(model)
    if sum(p.numel() for p in model.parameters()) > LARGE:
        card = {k: v for k, v in card.items() if k != "spec"}  # which builds the whole model once more
        small = _few_layers(model)
        if small is not None:
            try:
                return _save_and_load(small, card, folder)
            except RunDirectoryError:
                raise
            except Exception:  # noqa: BLE001  perhaps because layers are missing: the whole model decides
                pass
    _save_and_load(model, card, folder)


def _bare(model: nn.Module) -> nn.Module:
    return model.model if isinstance(model, SentenceEncoder) else model


def _check_config(model: nn.Module) -> None:
    """Whether the config of a transformers model builds the weights of the model again."""
    model = _bare(model)
    config: Any = getattr(model, "config", None)
    converted = has_adapters(model) or is_quantisation_aware(model)
    if converted or not callable(getattr(config, "to_dict", None)):
        return
    if getattr(config, "rescale_every", 0):  # RWKV: the file would not say whether its weights are scaled
        raise ValueError("it scales its weights in evaluation mode; set rescale_every to 0 in its config.json")
    again = weight_shapes(type(model), type(config).from_dict(config.to_dict()))
    own = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if again is not None and again != own:
        names = [name for name in own if again.get(name) != own[name]]
        raise ValueError(f"its config builds different weights ({', '.join(names[:3]) or 'more than it has'})")


def _few_layers(model: nn.Module) -> nn.Module | None:
    """A model of the same class with a layer of each kind and, if the family allows it, a small vocabulary.

    ``None`` if there is no such model with the same kinds of weights.
    """
    bare: Any = _bare(model)
    if has_adapters(bare) or is_quantisation_aware(bare) or not callable(getattr(bare, "save_pretrained", None)):
        return None
    kinds = _weight_kinds(bare)
    for shrink in (True, False):
        try:
            _, stack = find_layer_stack(bare)
            first = {tuple(sorted(dict(layer.named_parameters()))): i for i, layer in reversed([*enumerate(stack)])}
            config = config_for_layers(bare, sorted({0, min(1, len(stack) - 1), *first.values()}))
            config = with_vocabulary_size(config, VOCABULARY_SIZE) if shrink else config
            small = random_model(type(bare), type(config).from_dict(config.to_dict()))
            if _weight_kinds(small) == kinds:
                return model.with_encoder(small) if isinstance(model, SentenceEncoder) else small
        except Exception:  # noqa: BLE001  not every family can be built so
            continue
    return None


def _weight_kinds(model: nn.Module) -> set[str]:
    return {re.sub(r"\.\d+\.", ".*.", name) for name in model.state_dict()}


def _copy_on_cpu(model: nn.Module) -> nn.Module:
    """A copy whose weights are in main memory; it shares the tokenizer, which is slow to copy."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(x): _on_cpu(x) for x in tensors if x.device.type != "cpu"}
    tokenizer = getattr(model, "tokenizer", None)
    return copy.deepcopy(model, memo | {id(tokenizer): tokenizer})


def _on_cpu(x: Tensor) -> Tensor:
    value = x.detach().to("cpu", copy=True)
    return nn.Parameter(value, x.requires_grad) if isinstance(x, nn.Parameter) else value


def _save_and_load(model: nn.Module, card: Mapping[str, Any], parent: Path | None) -> None:
    """Save ``model`` as a run does, load it as a run does, and as ``tutelage predict`` and others do."""
    loaded = to_float_model(_copy_on_cpu(model))
    source = loaded if has_adapters(model) or is_quantisation_aware(model) else model  # a copy shares no memory
    parent = parent or Path(tempfile.gettempdir())
    with wrap_write_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=parent)
    with temporary as name:
        folder = Path(name) / "model"
        with wrap_write_errors(folder):
            save_model(source, folder, card)
        own = {k: x.detach().to("cpu", copy=True) for k, x in source.state_dict().items()}
        with torch.no_grad():
            for p in loaded.parameters():
                p.zero_()
        load_weights(loaded, folder)
        _compare(loaded, own)
        if card.get("spec") is not None or card.get("task") is not None:
            _compare(load_model(folder), own)


def _compare(model: nn.Module, own: Mapping[str, Tensor]) -> None:
    loaded = model.state_dict()
    different = [k for k, x in own.items() if k not in loaded or not torch.equal(loaded[k].to(x.dtype), x)]
    if different or len(loaded) > len(own):
        raise ValueError(f"other values in {', '.join(different[:3]) or 'weights that it did not have'}")


def _check_generates(student: nn.Module) -> None:
    """Whether the student writes two tokens, as it does for the samples of the report."""
    if not callable(getattr(student, "generate", None)):
        return
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    prompt = torch.ones(2, dtype=torch.int64, device=device)
    with _refusal(
        f"the student, a {type(student).__name__}, cannot generate the samples of the report",
        "set samples.generations=0; to use the student as a generator, keep other layers (student.map), since some "
        "families cannot generate without a layer of each kind",
    ):
        sample_completions(student, [prompt], max_new_tokens=2, temperature=0)
