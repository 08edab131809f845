"""Folders of sentence-transformers with random weights, in the layouts that its versions write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.text_worlds import encoder

TEXTS = ["song chord", "packet router dns mail socket", "matrix", "proof theorem of prime graph song song"]

FOLDERS: dict[str, dict[str, Any]] = {
    "mean": {"pooling": {"pooling_mode_mean_tokens": True}},
    "cls": {"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}},
    "max": {"pooling": {"pooling_mode": "max"}},
    "mean-sqrt-length": {"pooling": {"pooling_mode": "mean_sqrt_len_tokens"}},
    "weighted-mean": {"pooling": {"pooling_mode_weightedmean_tokens": True}, "normalize": True},
    "last-token": {"pooling": {"pooling_mode": "lasttoken"}, "normalize": True},
    "cls-dense-normalize": {"pooling": {"pooling_mode": "cls"}, "dense": "Tanh", "normalize": True},
    "mean-before-cls": {"pooling": {"pooling_mode": ["mean", "cls"]}},
    "two-poolings-dense": {"pooling": {"pooling_mode": ["cls", "mean"]}, "dense": "Identity"},
}
"""Nine folders: a pooling's config, the activation of a dense layer, and whether embeddings are normalised."""

PROMPTS = {"query": "song of ", "passage": "the "}

PROMPTED: dict[str, dict[str, Any]] = {
    f"{name}-{'with' if include else 'without'}-prompt": {
        **FOLDERS[name], "pooling": {**FOLDERS[name]["pooling"], "include_prompt": include},
        "settings": {"prompts": PROMPTS, "default_prompt_name": "query"},
    }
    for name, include in {
        "mean": True, "cls": False, "max": False, "mean-sqrt-length": False, "weighted-mean": False,
        "last-token": True, "cls-dense-normalize": True, "two-poolings-dense": False,
    }.items()
}  # fmt: skip
"""Eight folders with a default prompt, whose tokens the pooling counts or leaves out."""

WIDTH, OUT = 32, 12


def sentence_folder(
    folder: Path,
    *,
    pooling: dict[str, Any],
    dense: str | None = None,
    normalize: bool = False,
    settings: dict[str, Any] | None = None,
    binary: bool = False,
) -> Path:
    """A BERT of random weights with these modules behind it; ``settings`` name its prompts."""
    encoder(folder)
    if settings is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    kinds = ["Transformer", "Pooling", *(["Dense"] if dense else []), *(["Normalize"] if normalize else [])]
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for kind, path in zip(kinds[1:], paths[1:], strict=True):
        (folder / path).mkdir()
        config: dict[str, Any] = {}
        if kind == "Pooling":
            config = {"word_embedding_dimension": WIDTH, **pooling}
        elif kind == "Dense":
            modes = pooling.get("pooling_mode")
            width = WIDTH * (len(modes) if isinstance(modes, list) else 1)
            activation = f"torch.nn.modules.{'activation' if dense == 'Tanh' else 'linear'}.{dense}"
            config = {"in_features": width, "out_features": OUT, "bias": True, "activation_function": activation}
            torch.manual_seed(7)
            weights = {"linear.weight": torch.randn(OUT, width), "linear.bias": torch.randn(OUT)}
            if binary:
                torch.save(weights, folder / path / "pytorch_model.bin")
            else:
                save_file(weights, folder / path / "model.safetensors")
        (folder / path / "config.json").write_text(json.dumps(config))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32, "do_lower_case": False}))
    return folder
