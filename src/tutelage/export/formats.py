"""Write a model in each format."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_model as save_shared
from torch import Tensor, nn

from tutelage.data.preprocessing import RESAMPLE, Preprocessing
from tutelage.errors import CapabilityError, ModelError, TutelageError, first_line, require
from tutelage.export.bundle import IMAGE, Inputs, ModelBundle, TraceModule, is_transformers
from tutelage.export.image_files import SAME, greatest_difference
from tutelage.export.runtimes import ONNX, PROGRAM
from tutelage.files import silence_transformers
from tutelage.models import MODEL_CARD, WEIGHTS, read_image_files, save_model
from tutelage.models.files import read_card


@dataclass(frozen=True)
class ExportJob:
    """A model, the folder to write it to, names of its inputs, rows to trace with, and calibration inputs."""

    bundle: ModelBundle
    folder: Path
    names: tuple[str, ...]
    few: Inputs
    calibration: Sequence[Inputs] = ()


def _safetensors(job: ExportJob) -> dict[str, Any]:
    bundle, folder = job.bundle, job.folder
    if bundle.folder is None:
        raise CapabilityError(
            "this format needs the arguments that build the model, and a module passed from Python has none",
            remedy="use --to onnx or --to torch-export, which write its graph",
        )
    own = bundle.folder
    card = read_card(own) if (own / MODEL_CARD).exists() else {"task": bundle.task, "classes": bundle.classes}
    if is_transformers(bundle.model):
        save_model(bundle.model, folder, card)
    else:
        save_shared(bundle.model, str(folder / WEIGHTS))
        (folder / MODEL_CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return {}


def _huggingface(job: ExportJob) -> dict[str, Any]:
    bundle, folder = job.bundle, job.folder
    with silence_transformers(), _with_label_names(bundle):
        bundle.model.save_pretrained(folder)  # type: ignore[operator]
    if bundle.task == "images" and "mean" in bundle.preprocessing:
        own = Preprocessing.from_dict(bundle.preprocessing)
        config = image_processor(own)
        if config is None:
            return {"image_processor": "not written: transformers has none for this preprocessing, see README.md"}
        text = json.dumps(config, indent=2) + "\n"
        (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
        files = read_image_files(f"hf:{folder}", {}, None)
        assert files is not None
        assert files.pipeline is not None
        gap = greatest_difference(own, files.pipeline)
        if gap > SAME:
            return {"image_processor": f"its pixels differ from those in training by up to {gap:.2g} of 255"}
    return {}


@contextmanager
def _with_label_names(bundle: ModelBundle) -> Iterator[None]:
    """Put the label names into the model's config while it is saved."""
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


def image_processor(own: Preprocessing) -> dict[str, Any] | None:
    """The preprocessing of images as the config of an image processor of transformers, if it has one for it."""
    if own.channels != 3 or own.order != "RGB" or own.fit == "pad":
        return None
    sides = {"height": own.resize, "width": own.resize} if own.fit == "squash" else {"shortest_edge": own.resize}
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": sides, "resample": RESAMPLE[own.interpolation],
        "do_center_crop": True, "crop_size": {"height": own.size, "width": own.size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(own.mean), "image_std": list(own.std),
    }  # fmt: skip


def _program(job: ExportJob) -> dict[str, Any]:
    graph, inputs = _trace_inputs(job.bundle.model, job.names, job.few)
    dynamic = _dynamic_shapes(job.names, inputs, [torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC])
    with _trace_errors(job.bundle.model, "torch-export"):
        program = torch.export.export(graph, inputs, dynamic_shapes=dynamic)
        torch.export.save(program, job.folder / PROGRAM)
    return {"torch": torch.__version__}


def _onnx(job: ExportJob) -> dict[str, Any]:
    return write_onnx(job.bundle.model, job.names, job.few, job.folder / ONNX, output_name(job.bundle.task))


def output_name(task: str) -> str:
    """Name of the output of a graph; sentence-transformers expects ``sentence_embedding``."""
    return "sentence_embedding" if task == "embedding" else "logits"


def write_onnx(
    model: nn.Module, names: tuple[str, ...], few: Inputs, path: Path, output: str = "logits"
) -> dict[str, Any]:
    """Write an ONNX graph for any number of rows and tokens, traced with the rows ``few``.

    Raises:
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
        ModelError: the model cannot be traced.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "export", "an ONNX graph")
    graph, inputs = _trace_inputs(model, names, few)
    dynamic = _dynamic_shapes(names, inputs, ["batch", "sequence"])
    with _trace_errors(model, "onnx"), _silence_converters():
        program = torch.onnx.export(
            graph, inputs, dynamo=True, dynamic_shapes=dynamic, input_names=list(names), output_names=[output],
            verbose=False,
        )  # fmt: skip
        assert program is not None
        for node in program.model.graph.all_nodes():  # drops the source paths of this machine
            node.metadata_props.clear()
        program.save(str(path))
    import onnx

    opset = onnx.load(str(path), load_external_data=False).opset_import
    return {"opset": next(o.version for o in opset if o.domain in ("", "ai.onnx"))}


def _trace_inputs(model: nn.Module, names: tuple[str, ...], few: Inputs) -> tuple[TraceModule, tuple[Tensor, ...]]:
    return TraceModule(model, names).eval(), tuple(few[name] for name in names)


def _dynamic_shapes(names: tuple[str, ...], inputs: Sequence[Tensor], axes: Sequence[Any]) -> Any:
    """The dynamic dimensions: the rows, and for texts the tokens."""
    many = 1 if names == (IMAGE,) else 2
    return (tuple(dict(enumerate(axes[: min(many, x.ndim)])) for x in inputs),)


@contextmanager
def _trace_errors(model: nn.Module, to: str) -> Iterator[None]:
    """Disable gradients, and convert errors of tracing to :class:`ModelError`."""
    try:
        with torch.no_grad():
            yield
    except (TutelageError, OSError):
        raise
    except Exception as error:
        raise ModelError(
            f"the {type(model).__name__} cannot be traced: {first_line(error)[:300]}",
            where=f"--to {to}",
            remedy="use --to safetensors" + (" or --to hf" if is_transformers(model) else ""),
        ) from error


@contextmanager
def _silence_converters() -> Iterator[None]:
    """Turn off the warnings of converters and quantisers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _int8(job: ExportJob) -> dict[str, Any]:
    whole = job.folder / "whole.onnx"
    how = write_onnx(job.bundle.model, job.names, job.few, whole, output_name(job.bundle.task))
    calibration = job.calibration if has_convolutions(job.bundle.model) else ()
    how |= quantise_onnx(whole, job.folder / ONNX, job.names, calibration)
    whole.unlink()
    whole.with_name("whole.onnx.data").unlink(missing_ok=True)
    return how


def has_convolutions(model: nn.Module) -> bool:
    """Whether a model has convolutions, which are slow in ONNX Runtime with dynamic quantisation."""
    return any(isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for module in model.modules())


def quantise_onnx(whole: Path, to: Path, names: tuple[str, ...], calibration: Sequence[Inputs]) -> dict[str, Any]:
    """Quantise weights and activations of a graph to int8.

    Weights have one scale per output channel; in dynamic quantisation ONNX Runtime gives those of convolutions one.

    All types are unsigned: on processors without int8 instructions (VNNI), ONNX Runtime adds the products of unsigned
    and signed numbers in 16 bits, which overflow silently (a BERT lost a third of its predictions).

    ``calibration`` inputs fix the ranges of activations (static quantisation); without them the ranges are computed
    for each input (dynamic quantisation). Returns entries of the manifest.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    batches = iter([{name: inputs[name].numpy() for name in names} for inputs in calibration])
    with _silence_converters():
        if calibration:
            reader = SimpleNamespace(get_next=lambda: next(batches, None))  # as a CalibrationDataReader
            quantize_static(
                str(whole), str(to), reader, quant_format=QuantFormat.QDQ, per_channel=True,
                weight_type=QuantType.QUInt8, activation_type=QuantType.QUInt8,
            )  # fmt: skip
            rows = sum(len(inputs[names[0]]) for inputs in calibration)
            return {"quantisation": "static", "calibration_rows": rows}
        quantize_dynamic(str(whole), str(to), per_channel=True, weight_type=QuantType.QUInt8)
    return {"quantisation": "dynamic"}


FORMATS: dict[str, Callable[[ExportJob], dict[str, Any]]] = {
    "safetensors": _safetensors, "hf": _huggingface, "onnx": _onnx, "int8": _int8, "torch-export": _program,
}  # fmt: skip
"""The writer of each format, which returns entries of the manifest."""


def trace_rows(inputs: Inputs) -> Inputs:
    """At least two rows for tracing, since a single row would become a constant size."""
    rows = len(next(iter(inputs.values())))
    if rows >= 2:
        return {name: x[: min(rows, 3)] for name, x in inputs.items()}
    return {name: torch.cat([x, x]) for name, x in inputs.items()}
