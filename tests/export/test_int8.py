"""int8 graphs: a scale for each output channel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tutelage.export import formats
from tutelage.export.runtimes import onnx_runner

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_linear_layers_behind_a_convolution_have_a_scale_for_each_output(tmp_path: Path) -> None:
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Flatten(1), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        for layer in (model[2], model[4]):
            layer.weight.mul_(torch.randn(len(layer.weight), 1).mul(2).exp())
    x = torch.randn(200, 3, 16, 16)
    formats.write_onnx(model.eval(), ("image",), {"image": x[:2]}, tmp_path / "whole.onnx", "logits")
    formats.quantise_onnx(tmp_path / "whole.onnx", tmp_path / "int8.onnx", ("image",), ())
    quantize_dynamic(str(tmp_path / "whole.onnx"), str(tmp_path / "tensor.onnx"))
    graph = onnx.load(tmp_path / "int8.onnx").graph
    sizes = {w.name: list(w.dims) for w in graph.initializer}
    assert [sizes[n.input[3]] for n in graph.node if n.op_type == "MatMulInteger"] == [[64], [10]]
    whole, ours, coarse = (
        onnx_runner(tmp_path / name, ("image",))({"image": x}) for name in ("whole.onnx", "int8.onnx", "tensor.onnx")
    )
    assert (ours - whole).abs().mean() < 0.5 * (coarse - whole).abs().mean()
