"""Writing a model in each format."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model as save_shared
from torch import Tensor, nn

from tutelage.errors import CapabilityError, ModelError, TutelageError, require
from tutelage.export.bundle import IMAGE, Inputs, ModelBundle, TraceModule, is_transformers
from tutelage.export.runtimes import ONNX, PROGRAM
from tutelage.files import silence_transformers
from tutelage.models import MODEL_CARD, WEIGHTS, save_model
from tutelage.models.files import read_card

Writer = Callable[[ModelBundle, Path, tuple[str, ...], Inputs, Sequence[Inputs]], dict[str, Any]]
"""Writes a model to a folder, given the names of its inputs, a few rows of them, and others to calibrate with;
returns what is to be known of how."""


def _safetensors(
    bundle: ModelBundle, folder: Path, names: tuple[str, ...], few: Inputs, others: Sequence[Inputs]
) -> dict[str, Any]:
    if bundle.folder is None:
        raise CapabilityError(
            "a module of your own has no folder that says how to build it again",
            remedy="--to onnx and --to torch-export write its graph",
        )
    own = bundle.folder
    card = read_card(own) if (own / MODEL_CARD).exists() else {"task": bundle.task, "classes": bundle.classes}
    if is_transformers(bundle.model):
        save_model(bundle.model, folder, card)
    else:
        save_shared(bundle.model, str(folder / WEIGHTS))
        (folder / MODEL_CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return {}


def _huggingface(
    bundle: ModelBundle, folder: Path, names: tuple[str, ...], few: Inputs, others: Sequence[Inputs]
) -> dict[str, Any]:
    with silence_transformers(), _labelled(bundle):
        bundle.model.save_pretrained(folder)  # type: ignore[operator]
    if bundle.task == "images" and bundle.preprocessing.get("channels") == 3:
        (folder / "preprocessor_config.json").write_text(
            json.dumps(image_processor(bundle.preprocessing), indent=2) + "\n", encoding="utf-8"
        )
    return {}


@contextmanager
def _labelled(bundle: ModelBundle) -> Iterator[None]:
    """The model with the names of its labels in its config, for as long as it is saved."""
    config: Any = bundle.model.config
    before = (dict(config.id2label), dict(config.label2id)) if getattr(config, "id2label", None) else None
    if before is not None and bundle.classes and len(before[0]) == len(bundle.classes):
        config.id2label = dict(enumerate(bundle.classes))
        config.label2id = {name: i for i, name in enumerate(bundle.classes)}
    try:
        yield
    finally:
        if before is not None:
            config.id2label, config.label2id = before


def image_processor(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """What is done to an image, as transformers' image processors have it."""
    size, crop = preprocessing["size"], preprocessing.get("crop", 1.0)
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": max(size, round(size / crop))}, "resample": 2,
        "do_center_crop": True, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": preprocessing["mean"], "image_std": preprocessing["std"],
    }  # fmt: skip


# Graphs ------------------------------------------------------------------------------------------------


def _program(
    bundle: ModelBundle, folder: Path, names: tuple[str, ...], few: Inputs, others: Sequence[Inputs]
) -> dict[str, Any]:
    graph, given = _drawn(bundle.model, names, few)
    dynamic = _dynamic(names, given, [torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC])
    with _explained(bundle.model, "torch-export"):
        program = torch.export.export(graph, given, dynamic_shapes=dynamic)
        torch.export.save(program, folder / PROGRAM)
    return {"torch": torch.__version__}


def _onnx(
    bundle: ModelBundle, folder: Path, names: tuple[str, ...], few: Inputs, others: Sequence[Inputs]
) -> dict[str, Any]:
    return write_onnx(bundle.model, names, few, folder / ONNX, output_name(bundle.task))


def output_name(task: str) -> str:
    """What comes out of a graph, by its name there; an embedding's is that of sentence-transformers."""
    return "sentence_embedding" if task == "embedding" else "logits"


def write_onnx(
    model: nn.Module, names: tuple[str, ...], few: Inputs, path: Path, output: str = "logits"
) -> dict[str, Any]:
    """Write a model's graph for ONNX Runtime, for any number of rows, and of tokens.

    Args:
        model: in evaluation mode, on the CPU.
        names: of its inputs.
        few: two rows of them or more.
        path: of the file.
        output: its output's name.

    Raises:
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
        ModelError: no graph can be drawn of it.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "export", "an ONNX graph")
    graph, given = _drawn(model, names, few)
    dynamic = _dynamic(names, given, ["batch", "sequence"])
    with _explained(model, "onnx"), _hushed():
        program = torch.onnx.export(
            graph, given, dynamo=True, dynamic_shapes=dynamic, input_names=list(names), output_names=[output],
            verbose=False,
        )  # fmt: skip
        assert program is not None
        for node in program.model.graph.all_nodes():  # with each comes where in whose files it was written
            node.metadata_props.clear()
        program.save(str(path))
    import onnx

    opset = onnx.load(str(path), load_external_data=False).opset_import
    return {"opset": next(o.version for o in opset if o.domain in ("", "ai.onnx"))}


def _drawn(model: nn.Module, names: tuple[str, ...], few: Inputs) -> tuple[TraceModule, tuple[Tensor, ...]]:
    return TraceModule(model, names).eval(), tuple(few[name] for name in names)


def _dynamic(names: tuple[str, ...], given: Sequence[Tensor], axes: Sequence[Any]) -> Any:
    """Which sizes may change: the rows, and of texts the tokens."""
    many = 1 if names == (IMAGE,) else 2
    return (tuple(dict(enumerate(axes[: min(many, x.ndim)])) for x in given),)


@contextmanager
def _explained(model: nn.Module, to: str) -> Iterator[None]:
    """Without gradients; a model that no graph can be drawn of is the user's to know, in a sentence."""
    try:
        with torch.no_grad():
            yield
    except (TutelageError, OSError):
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"no graph can be drawn of the {type(model).__name__}: {reason.strip()[:300]}",
            where=f"--to {to}",
            remedy="--to safetensors keeps it as it is" + (", --to hf too" if is_transformers(model) else ""),
        ) from error


@contextmanager
def _hushed() -> Iterator[None]:
    """Without remarks of converters and quantisers that a user can do nothing about."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# Eight bits --------------------------------------------------------------------------------------------


def _int8(
    bundle: ModelBundle, folder: Path, names: tuple[str, ...], few: Inputs, others: Sequence[Inputs]
) -> dict[str, Any]:
    whole = folder / "whole.onnx"
    found = write_onnx(bundle.model, names, few, whole, output_name(bundle.task))
    found |= quantise_onnx(whole, folder / ONNX, names, others if has_convolutions(bundle.model) else ())
    whole.unlink()
    whole.with_name("whole.onnx.data").unlink(missing_ok=True)
    return found


def has_convolutions(model: nn.Module) -> bool:
    """Whether a model has convolutions, which ONNX Runtime is slow at when activations are rounded as they come."""
    return any(isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for module in model.modules())


def quantise_onnx(whole: Path, to: Path, names: tuple[str, ...], calibration: Sequence[Inputs]) -> dict[str, Any]:
    """Round a graph's weights to eight bits, a scale for each output, and its activations.

    All are unsigned: where a processor has no instructions for eight bits (VNNI), ONNX Runtime adds products of
    unsigned and signed numbers up in sixteen bits, which overflow unnoticed; a BERT lost a third of its answers so.

    Args:
        whole: the graph in float32.
        to: the file to write.
        names: of its inputs.
        calibration: inputs by which the range of each activation is fixed (static); without any, ranges are those of
            each input as it comes (dynamic).

    Returns:
        How it was done.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    with _hushed():
        if calibration:
            quantize_static(
                str(whole), str(to), _Reader(names, calibration), quant_format=QuantFormat.QDQ, per_channel=True,
                weight_type=QuantType.QUInt8, activation_type=QuantType.QUInt8,
            )  # fmt: skip
            rows = sum(len(inputs[names[0]]) for inputs in calibration)
            return {"rounding": "static", "calibration_rows": rows}
        quantize_dynamic(str(whole), str(to), per_channel=not _has_convolutions(whole), weight_type=QuantType.QUInt8)
    return {"rounding": "dynamic"}


def _has_convolutions(path: Path) -> bool:
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return any(node.op_type == "Conv" for node in graph.node)


class _Reader:
    """Gives a quantiser its calibration inputs, one after another."""

    def __init__(self, names: tuple[str, ...], batches: Sequence[Inputs]) -> None:
        self._rest = iter([{name: inputs[name].numpy() for name in names} for inputs in batches])

    def get_next(self) -> dict[str, Any] | None:
        """The next inputs; ``None`` at the end."""
        return next(self._rest, None)


FORMATS: dict[str, Writer] = {
    "safetensors": _safetensors,
    "hf": _huggingface,
    "onnx": _onnx,
    "int8": _int8,
    "torch-export": _program,
}
"""Writes each format."""


def trace_rows(inputs: Inputs) -> Inputs:
    """Rows to draw a graph with: as many that no size is mistaken for a constant."""
    rows = len(next(iter(inputs.values())))
    if rows >= 2:
        return {name: x[: min(rows, 3)] for name, x in inputs.items()}
    return {name: torch.cat([x, copy.deepcopy(x)]) for name, x in inputs.items()}
