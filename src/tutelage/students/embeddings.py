"""Smaller embedding tables: fewer tokens, or a low-rank factorisation."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.errors import ConfigError, ModelError
from tutelage.students.config_probing import (
    build_from_config,
    copy_weights,
    replace_fields,
    shape_changes,
    size_fields,
    weight_shapes,
    with_vocabulary_size,
)
from tutelage.students.layer_selection import find_layer_stack, require_config
from tutelage.students.projectors import device_of, eval_no_grad


def trim_embeddings(model: nn.Module, token_ids: Tensor | Sequence[int]) -> nn.Module:
    """A copy of a transformers model for a part of its vocabulary.

    All weights with a row for each token (input embeddings, output head, its bias) keep the rows of ``token_ids``.
    Ids of special tokens in the config follow.

    Args:
        model: not changed, and shares no memory with the copy.
        token_ids: ``[K]`` old ids in ascending order; new id i is old id ``token_ids[i]``, as from
            :func:`trim_tokenizer`.

    Raises:
        ConfigError: ids are not ascending, or outside of the vocabulary.
        ModelError: not a transformers model; a special token of its config is missing in ``token_ids``; or position
            ids start after the id of the padding token, and that id changes.
    """
    ids = [int(i) for i in token_ids]
    config = require_config(model)
    size = int(config.vocab_size)
    if not ids or ids[0] < 0 or ids[-1] >= size or any(a >= b for a, b in pairwise(ids)):
        raise ConfigError(
            f"token_ids must be ascending ids from 0 to {size - 1}, each once",
            remedy="pass the ids that trim_tokenizer() returns for this model's own tokenizer",
        )
    new_ids = {old: new for new, old in enumerate(ids)}
    smaller = replace_fields(config, vocab_size=len(ids))
    _move_ids(smaller, new_ids, size)
    before, after = (weight_shapes(type(model), with_vocabulary_size(config, count)) for count in (size, size + 1))
    rows = shape_changes(before, after) if before else None
    if not rows:
        raise ModelError(
            f"no weight of {type(model).__name__} depends on the vocabulary size",
            remedy="use a model with token embeddings",
        )
    index = torch.tensor(ids, device=device_of(model))

    def part(name: str, value: Tensor) -> Tensor:
        for i in range(value.ndim):
            value = value.index_select(i, index) if (name, i) in rows else value
        return value

    new = build_from_config(model, smaller)
    copy_weights(new, model, lambda name: name, part)
    if getattr(new, "generation_config", None) is not None:
        _move_ids(new.generation_config, new_ids, size)
    if getattr(config, "pad_token_id", None) != getattr(smaller, "pad_token_id", None):
        _check_positions(model, new, index)
    return new


def _move_ids(config: Any, new_ids: dict[int, int], size: int) -> None:
    """Set the new ids of special tokens. Ids outside of the vocabulary have no meaning and become ``None``."""

    def new_id(name: str, old: int) -> int | None:
        if old in new_ids:
            return new_ids[old]
        if 0 <= old < size:
            raise ModelError(
                f"{name} of the {type(config).__name__} is {old}, which is not among the kept ids",
                remedy="keep that token (trim_tokenizer(..., keep=[...])), or set it to None in the model's config",
            )
        return None

    for name, value in config.to_dict().items():
        if name.endswith("_token_id") and isinstance(value, int):
            setattr(config, name, new_id(name, value))
        elif name.endswith("_token_id") and isinstance(value, list):
            setattr(config, name, [i for i in (new_id(name, old) for old in value) if i is not None])


def _check_positions(model: Any, new: Any, index: Tensor) -> None:
    """Raise :class:`ModelError` if outputs depend on the id of the padding token."""
    pad = new.config.pad_token_id
    ids = torch.tensor([[i for i in range(len(index)) if i != pad][-8:]], device=index.device)
    with eval_no_grad(model), eval_no_grad(new):
        try:
            before, after = model.base_model(input_ids=index[ids])[0], new.base_model(input_ids=ids)[0]
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} does not run on token ids alone: {error}",
                remedy="trim the text model inside it",
            ) from error
    if not torch.allclose(before.float(), after.float(), rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"positions of {type(model).__name__} start behind the id of its padding, {model.config.pad_token_id}, "
            f"which would become {pad}",
            remedy=f"keep all ids up to {model.config.pad_token_id}, so that it does not change",
        )


def factorise_embeddings(model: nn.Module, rank: int, seed: int = 0) -> tuple[nn.Module, list[str]]:
    """The model with token embeddings of width ``rank`` and a matrix from there to its hidden size.

    The new tables are projections of the old ones to the basis with the largest singular values of the token,
    position and type tables together, each table divided by the root of its length. If a layer norm comes before the
    matrix, as in ELECTRA, tables are centred and the basis is orthogonal to the mean, so that the norm divides by the
    same number as before. Both are exact for tables of that rank. Also returns the names of weights that start random
    (an output head of the embeddings' width).

    Reference: Lan et al., ALBERT (2020), section 3.1.
    """
    source: Any = model
    table = source.get_input_embeddings()
    width = int(table.weight.shape[1])
    if not 2 <= rank < width:
        raise ConfigError(f"embedding is {rank}, and the teacher's is {width}", remedy=f"use 2 to {width - 1}")
    config, rows = _narrower(model, rank, width)
    new: Any = build_from_config(model, config, seed)
    projection = _projection(model, new, rank)
    narrow = [p for p, m in new.named_modules() if isinstance(m, nn.Embedding) and m.weight.shape[1] == rank]
    narrow = [p for p in narrow if (f"{p}.weight", 1) in rows]
    norm = _norm(new, rank, width, rows)
    computed = {*(f"{p}.weight" for p in narrow), *(f"{projection}.{x}" for x in ("weight", "bias"))}
    computed |= {f"{norm}.weight", f"{norm}.bias"} if norm else set()
    word = new.get_input_embeddings().weight
    computed |= {name for name, p in new.named_parameters(remove_duplicate=False) if p is word}  # tied
    changed = computed | {name for name, _ in rows}
    missing = copy_weights(new, model, lambda name: "" if name in changed else name, lambda name, value: value)
    with torch.no_grad():
        tables = {p: source.get_submodule(p).weight.detach().double() for p in narrow}
        _fill(new, source, tables, projection, norm, rank)
    return new, [name for name in missing if name not in computed]


def _narrower(model: nn.Module, rank: int, width: int) -> tuple[Any, dict[tuple[str, int], int]]:
    """The config with the one number changed that makes the token embeddings narrower, and no layer."""
    config, kind, (stack, _) = require_config(model), type(model), find_layer_stack(model)
    before = weight_shapes(kind, config) or {}
    word = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())  # type: ignore[operator]
    for name in dict.fromkeys([*(k for k, v in size_fields(config).items() if v == width), "embedding_size"]):
        try:
            smaller = replace_fields(config, **{name: rank})
        except Exception:  # noqa: BLE001  configs raise different errors
            continue
        after = weight_shapes(kind, smaller) or {}
        shared = before.keys() & after.keys()
        rows = shape_changes({n: before[n] for n in shared}, {n: after[n] for n in shared})
        layers = any(key[0].startswith(f"{stack}.") for key in rows or ())
        # a matrix with ``rank`` inputs that is new, or had more inputs
        matrix = any(len(s) == 2 and s[1] == rank and before.get(n, ())[:1] in ((), s[:1]) for n, s in after.items())
        if rows and not layers and matrix and rows.get((f"{word}.weight", 1)) == rank - width:
            return smaller, rows
    raise ModelError(
        f"{kind.__name__} has no embeddings narrower than its hidden size: no number of its config makes them so",
        remedy="trim the vocabulary (trim_tokenizer, trim_embeddings), use width=, or a teacher with embedding_size, "
        "such as ELECTRA or DeBERTa-v2",
    )


def _projection(model: nn.Module, new: nn.Module, rank: int) -> str:
    """The linear module from ``rank`` to the hidden size: new, or narrower than it was."""
    hidden = int(require_config(model).hidden_size)
    shape, before = (hidden, rank), {name: x.shape for name, x in model.named_parameters()}
    linear = {p: m.weight.shape for p, m in new.named_modules() if isinstance(m, nn.Linear)}
    matches = [p for p, s in linear.items() if s == shape and before.get(f"{p}.weight") != shape]
    if len(matches) != 1:
        raise ModelError(
            f"cannot find the matrix after the embeddings of {type(model).__name__}", remedy="remove embedding="
        )
    return matches[0]


def _norm(new: nn.Module, rank: int, width: int, rows: dict[tuple[str, int], int]) -> str | None:
    """The layer norm of the embeddings, if it comes before the matrix."""
    word = next(n for n, m in new.named_modules() if m is new.get_input_embeddings())  # type: ignore[operator]
    parent = word.rpartition(".")[0]
    norms = [n for n, m in new.get_submodule(parent).named_modules() if isinstance(m, nn.LayerNorm)]
    norms = [f"{parent}.{n}" if parent else n for n in norms]
    return next((n for n in norms if rows.get((f"{n}.weight", 0)) == rank - width), None)


def _fill(new: Any, old: Any, tables: dict[str, Tensor], projection: str, norm: str | None, rank: int) -> None:
    width = next(iter(tables.values())).shape[1]
    if norm:
        tables = {p: x - x.mean(1, keepdim=True) for p, x in tables.items()}
    moments = sum((x.mT @ x / len(x) for x in tables.values()), torch.zeros(()).to(next(iter(tables.values()))))
    _, vectors = torch.linalg.eigh(moments)
    basis = vectors.flip(1)[:, : rank - 1 if norm else rank]
    try:
        before = old.get_submodule(projection)
    except AttributeError:
        before = None
    widen = torch.eye(width).to(basis) if before is None else before.weight.double()
    bias = torch.zeros(len(widen)).to(basis) if before is None or before.bias is None else before.bias.double()
    shrink, after = 1.0, new.get_submodule(projection)
    if norm:
        ones = torch.ones(rank, 1).to(basis)
        turn = torch.linalg.qr(torch.cat([ones, torch.eye(rank).to(basis)[:, 1:]], 1)).Q[:, 1:]  # away from the mean
        basis, shrink = basis @ turn.mT, (rank / width) ** 0.5
        bias = bias + widen @ old.get_submodule(norm).bias.double()
        widen = widen * old.get_submodule(norm).weight.double()
        new.get_submodule(norm).weight.fill_(1)
        new.get_submodule(norm).bias.zero_()
    for p, x in tables.items():
        new.get_submodule(p).weight.copy_(x @ basis * shrink)
    after.weight.copy_(widen @ basis / shrink)
    if after.bias is not None:
        after.bias.copy_(bias)
