"""Checks that a student with fewer layers computes what its teacher computes without the removed layers."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.errors import ModelError, first_line
from tutelage.students.config_probing import run_model
from tutelage.students.layer_selection import find_layer_stack, require_config
from tutelage.students.projectors import eval_no_grad
from tutelage.taps.heads import no_cache_arguments

PLAIN = (bool, int, float, str)


def check_depth(teacher: nn.Module, student: nn.Module, layers: Sequence[int]) -> None:
    """Compare a student with its teacher on one batch, with the removed layers of the teacher skipped.

    Numbers and switches of the layers are compared too, such as the window of an attention, which a short batch does
    not show. Layers in another order, or repeated, have no counterpart in the teacher: only these are compared.

    Args:
        teacher: the larger model; not changed.
        student: of the same class, with the teacher's weights.
        layers: for each layer of the student the layer of the teacher.

    Raises:
        ModelError: they differ, or a model does not run.
    """
    family = type(teacher).__name__
    remedy = "choose other layers (student.map), such as first, or keep all layers"
    is_ordered = list(layers) == sorted(set(layers))
    _, stack = find_layer_stack(teacher)
    extra, readers = dict[int, Tensor](), list[nn.Module]()
    skip, note = partial(_skip, extra), partial(_note_reader, extra, readers)
    handles = [
        layer.register_forward_pre_hook(note, with_kwargs=True)
        if i in layers
        else layer.register_forward_hook(skip, with_kwargs=True)
        for i, layer in enumerate(stack)
    ]
    try:
        expected, own = _outputs(teacher), _outputs(student)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{family} with layers {_list(layers)} does not run on one batch: {first_line(error)[:200]}",
            remedy="keep all layers, or name a smaller model as student.model",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if difference := _setting_that_differs(teacher, student, layers):  # some are set by the first batch
        raise ModelError(
            f"a {family} student with layers {_list(layers)} differs from its teacher: {difference}", remedy=remedy
        )
    if not is_ordered:
        return
    if readers:
        raise ModelError(
            f"a {family} student with layers {_list(layers)} differs from its teacher: layer "
            f"{list(stack).index(readers[0])} reads what a removed layer computes in addition to its "
            "hidden states, such as a choice of tokens",
            remedy=remedy,
        )
    tolerance = max(1e-5, torch.finfo(expected.dtype).eps) * float(expected.abs().max())
    if own.shape != expected.shape or not float((own - expected).abs().max()) <= tolerance:
        raise ModelError(
            f"a {family} student with layers {_list(layers)} does not compute what the teacher computes without "
            "the other layers, because layers of this family depend on their position",
            remedy=remedy,
        )


def _list(layers: Sequence[int]) -> str:
    return ", ".join(str(layer) for layer in layers[:12]) + (" ..." if len(layers) > 12 else "")


def _skip(extra: dict[int, Tensor], module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """The output of a layer with the hidden states that it read in place of those that it computed.

    Further tensors that it computed are added to ``extra``.
    """
    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    states = next(x for x in inputs if x.is_floating_point())
    if isinstance(output, Tensor):
        return states
    known = {id(x) for x in inputs}
    extra.update({id(x): x for x in output[1:] if isinstance(x, Tensor) and id(x) not in known})
    return type(output)((states, *output[1:]))


def _note_reader(
    extra: dict[int, Tensor], readers: list[nn.Module], module: nn.Module, args: Any, kwargs: Any
) -> None:
    if any(id(x) in extra for x in (*args, *kwargs.values())):
        readers.append(module)


def _outputs(model: nn.Module) -> Tensor:
    """The first output of a model for a small batch."""
    config = require_config(model)
    arguments = no_cache_arguments(model)
    with eval_no_grad(model):
        if getattr(model, "main_input_name", "input_ids") != "pixel_values":
            return run_model(model, min(int(config.vocab_size), 1000), **arguments)[0]
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        weight = next(model.parameters())
        pixels = torch.linspace(-1, 1, 2 * config.num_channels * height * width).to(weight)
        output: Any = model(pixel_values=pixels.view(2, config.num_channels, height, width))
        return next(x for x in output.to_tuple() if isinstance(x, Tensor))


def _setting_that_differs(teacher: nn.Module, student: nn.Module, layers: Sequence[int]) -> str | None:
    """The first number, switch or text of a module in a layer that is another one in the student."""
    _, theirs = find_layer_stack(teacher)
    _, own = find_layer_stack(student)
    for i, number in enumerate(layers):
        modules = dict(theirs[number].named_modules())
        for path, module in own[i].named_modules():
            other = modules.get(path)
            if other is None or type(other) is not type(module) or module.training != other.training:
                continue
            for name, buffer in module.named_buffers(recurse=False):
                same = getattr(other, name, None)
                if isinstance(same, Tensor) and not (same.shape == buffer.shape and same.equal(buffer)):
                    where = f"{path}.{name}" if path else name
                    return f"{where} of layer {i} has other values than in the teacher's layer {number}"
            for name, value in vars(module).items():
                wanted = vars(other).get(name)
                if not isinstance(value, PLAIN) or value == wanted or not isinstance(wanted, PLAIN):
                    continue
                if not isinstance(value, (bool, str)) and value - i == wanted - number:  # type: ignore[operator]
                    continue  # the layer's number
                where = f"{path}.{name}" if path else name
                return f"{where} of layer {i} is {value!r}, but {wanted!r} in the teacher's layer {number}"
    return None
