"""What the server of ``support.python`` imports once for all of its forks."""

from __future__ import annotations

import contextlib
import gc
import importlib

MODULES = (
    "tutelage.api",
    "tutelage.cli.run",
    "tutelage.reports.page",
    "accelerate",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "transformers.models.bert.modeling_bert",
    "safetensors.torch",
    "sklearn.datasets",
    "sklearn.model_selection",
    "plotly.offline",
)

for name in MODULES:
    with contextlib.suppress(ImportError):  # the core alone has no transformers
        importlib.import_module(name)

gc.collect()
gc.freeze()  # forks share these pages
