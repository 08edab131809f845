"""What sentence-transformers puts after an encoder: pooling, dense layers and normalisation, with their files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.errors import ModelError, shorten

MODULES, SETTINGS = "modules.json", "config_sentence_transformers.json"
POOLINGS = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip
"""Keys of an older pooling config, which concatenates several modes in this order, and the modes of a newer one."""


class Pooling(nn.Module):
    """One vector for each text from the hidden states of its tokens, ``[B, L, D]`` to ``[B, len(modes) * D]``.

    Args:
        modes: of ``cls``, ``max``, ``mean``, ``mean_sqrt_len_tokens``, ``weightedmean``, ``lasttoken``.
        include_prompt: saved with the pooling; sentence-transformers leaves a prompt's tokens out if it is false.

    Reference: Reimers and Gurevych, Sentence-BERT (EMNLP 2019), section 3; other modes: sentence-transformers 6.2.
    """

    def __init__(self, modes: Sequence[str] = ("mean",), include_prompt: bool = True) -> None:
        super().__init__()
        self.modes, self.include_prompt = tuple(modes), include_prompt

    def config(self, width: int) -> dict[str, Any]:
        """What ``config.json`` holds, in the older form where it can express the modes and their order."""
        flags = {key: mode in self.modes for key, mode in POOLINGS.items()}
        ordered = [mode for mode in POOLINGS.values() if mode in self.modes]
        modes = flags if ordered == list(self.modes) else {"pooling_mode": list(self.modes)}
        return {"word_embedding_dimension": width, **modes, "include_prompt": self.include_prompt}

    def forward(self, states: Tensor, mask: Tensor, skip: int = 0) -> Tensor:
        """``mask`` ``[B, L]`` is 1 at tokens that are not padding; the first ``skip`` of these are left out."""
        place, first = torch.arange(mask.shape[1], device=mask.device), mask.to(torch.int32).argmax(1)
        if skip:
            mask = mask * (place >= first.unsqueeze(-1) + skip).to(mask.dtype)
        return torch.cat([self._pool(mode, states, mask, place, first) for mode in self.modes], -1)

    def _pool(self, mode: str, states: Tensor, mask: Tensor, place: Tensor, first: Tensor) -> Tensor:
        weight = mask.unsqueeze(-1).to(states.dtype)
        if mode in ("cls", "lasttoken"):
            token = mask.to(torch.int32).argmax(1) if mode == "cls" else (mask * place).argmax(1)
            return states.gather(1, token.view(-1, 1, 1).expand(-1, 1, states.shape[-1])).squeeze(1)
        if mode == "max":
            return states.masked_fill(weight == 0, float("-inf")).amax(1)
        if mode == "weightedmean":  # weights 1, 2, 3 ... from the first token that is not padding
            weight = weight * (place + 1 - first.unsqueeze(-1)).unsqueeze(-1)
        total = weight.sum(1).clamp(min=1)
        return (states * weight).sum(1) / (total.sqrt() if mode == "mean_sqrt_len_tokens" else total)


class DenseLayer(nn.Module):
    """A linear layer with an activation, on embeddings."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
        path = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        activation = getattr(nn, path.rpartition(".")[2], None)
        allowed = (None, False, "sentence_embedding")
        names = ("use_residual", "module_input_name", "module_output_name")
        unsupported = [k for k in names if config.get(k) not in allowed]
        if not path.startswith("torch.nn.") or activation is None or unsupported:
            raise ModelError(
                f"its Dense module has {shorten(unsupported or path)}, which is not supported",
                remedy="use a model with linear layers and activations of torch.nn",
            )
        self.activation, self.path = activation(), path

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_features]`` to ``[B, out_features]``."""
        y: Tensor = self.activation(self.linear(x))
        return y


class UnitLength(nn.Module):
    """Embeddings divided by their L2 norm."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, D]``, rows of length 1."""
        return F.normalize(x, dim=-1)


class SentenceModules(nn.Module):
    """Everything after the encoder: a pooling, then dense layers and normalisations in their order.

    Args:
        pooling: default the mean over tokens.
        layers: each a :class:`DenseLayer` or :class:`UnitLength`.
        max_length: tokens that a text is cut to; ``None`` if the folder names no limit.
        settings: ``prompts``, ``default_prompt_name`` and ``similarity_fn_name``, as the folder has them.

    Attributes:
        skip: number of tokens of the prompt, if the pooling leaves them out.
    """

    def __init__(
        self,
        pooling: Pooling | None = None,
        layers: Sequence[nn.Module] = (),
        max_length: int | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.pooling, self.layers, self.max_length = pooling or Pooling(), nn.ModuleList(layers), max_length
        self.settings, self.skip = settings or {}, 0

    @property
    def prompt(self) -> str:
        """What stands before each text; empty without a default prompt."""
        return find_prompt(self.settings)

    def use_prompt(self, name: str | None, tokenizer: Any) -> None:
        """Make the prompt of this name the default, which is saved; ``None``: the folder's; empty: no prompt.

        Raises:
            ModelError: the folder has no such prompt.
        """
        text = find_prompt(self.settings, name)
        if name is not None:
            self.settings = {**self.settings, "default_prompt_name": name or None}
        self.skip = 0 if self.pooling.include_prompt or not text else _prompt_length(tokenizer, text)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Embeddings of hidden states ``[B, L, D]``."""
        x: Tensor = self.pooling(states, mask, self.skip)
        for layer in self.layers:
            x = layer(x)
        return x

    def describe(self) -> list[str]:
        """The modules in order, as text."""
        skip = [f"without {self.skip} tokens of the prompt"] if self.skip else []
        return ["+".join(self.pooling.modes), *skip, *(str(layer) for layer in self.layers)]

    def tensors(self, folder: Path, prefix: str) -> dict[str, Tensor]:
        """The tensors of the dense layers in a saved folder, by their names below ``prefix``."""
        listed = _json(str(folder), MODULES) or []
        return {
            f"{prefix}layers.{i}.{name}": tensor
            for i, one in enumerate(listed[2:])
            if str(one.get("type", "")).endswith("Dense")
            for name, tensor in _dense_weights(str(folder), one["path"]).items()
        }

    def save(self, folder: Path, width: int) -> None:
        """Write the files that sentence-transformers reads, for an encoder with hidden states of ``width``."""
        listed: list[dict[str, Any]] = []

        def add(name: str, config: dict[str, Any] | None) -> None:
            number = len(listed)
            path = f"{number}_{name}" if config is not None else ""
            kind = f"sentence_transformers.models.{name}"
            listed.append({"idx": number, "name": str(number), "path": path, "type": kind})
            if config is not None:
                (folder / path).mkdir(exist_ok=True)
                (folder / path / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")

        add("Transformer", None)
        add("Pooling", self.pooling.config(width))
        for layer in self.layers:
            if isinstance(layer, DenseLayer):
                linear = layer.linear
                config = {"in_features": linear.in_features, "out_features": linear.out_features}
                add("Dense", config | {"bias": linear.bias is not None, "activation_function": layer.path})
                weights = {f"linear.{name}": p.detach().cpu().contiguous() for name, p in linear.named_parameters()}
                save_file(weights, folder / listed[-1]["path"] / "model.safetensors")
            else:
                add("Normalize", {})
        (folder / MODULES).write_text(json.dumps(listed, indent=1), encoding="utf-8")
        if self.settings:
            (folder / SETTINGS).write_text(json.dumps(self.settings, indent=1), encoding="utf-8")
        if self.max_length is not None:
            limit = json.dumps({"max_seq_length": self.max_length, "do_lower_case": False})
            (folder / "sentence_bert_config.json").write_text(limit, encoding="utf-8")


def read_sentence_modules(source: str) -> SentenceModules:
    """The modules in a folder or hub id of sentence-transformers; the mean for a model without ``modules.json``.

    Raises:
        ModelError: a module, or an option of one, that is not supported.
    """
    listed = _json(source, MODULES)
    if listed is None:
        _check_no_modules(source)
        return SentenceModules()
    kinds = [str(one.get("type", "")).rpartition(".")[2] for one in listed]
    if kinds[:2] != ["Transformer", "Pooling"] or listed[0].get("path") or set(kinds[2:]) - {"Dense", "Normalize"}:
        raise ModelError(
            f"its modules are {shorten(', '.join(kinds))}, and an embedding of them cannot be computed",
            remedy="use a model of Transformer (in the folder itself), Pooling, and then Dense or Normalize",
        )
    limits = _json(source, "sentence_bert_config.json") or {}
    if limits.get("do_lower_case"):
        raise ModelError(
            "its sentence_bert_config.json has do_lower_case, which the tokenizer does not do by itself",
            remedy="lower the texts, and set do_lower_case to false in a copy of the model",
        )
    layers: list[nn.Module] = []
    for one, kind in zip(listed[2:], kinds[2:], strict=True):
        layers.append(UnitLength() if kind == "Normalize" else _dense(source, one["path"]))
    limit = limits.get("max_seq_length") or _tokenizer_limit(source)
    pooling = _pooling(_json(source, f"{listed[1]['path']}/config.json") or {})
    return SentenceModules(pooling, layers, limit, read_prompt_settings(source))


def _check_no_modules(source: str) -> None:
    """Raise :class:`ModelError` if a model of the hub may have a ``modules.json`` that was not downloaded."""
    from huggingface_hub import try_to_load_from_cache

    if not Path(source).is_dir() and try_to_load_from_cache(source, MODULES) is None:
        raise ModelError(
            f"its {MODULES}, which names its pooling, is not in the local cache, and the hub cannot be reached",
            remedy="download the model while online, or give the folder of the complete model: hf:FOLDER",
        )


def _tokenizer_limit(source: str) -> int | None:
    """``model_max_length``, where sentence-transformers 6 keeps the limit; a huge number there means none."""
    limit = (_json(source, "tokenizer_config.json") or {}).get("model_max_length")
    return int(limit) if limit is not None and limit < 10**9 else None


def read_prompt_settings(source: str) -> dict[str, Any]:
    """Prompts and similarity function of a folder or hub id of sentence-transformers; empty if it names none.

    Raises:
        ModelError: the default prompt is not one of the prompts.
    """
    given = _json(source, SETTINGS) or {}
    settings = {k: given[k] for k in ("prompts", "default_prompt_name", "similarity_fn_name") if k in given}
    find_prompt(settings)
    return settings


def find_prompt(settings: dict[str, Any], name: str | None = None) -> str:
    """The text of a prompt; ``None``: of the default prompt, if there is one; an empty name: no prompt.

    Raises:
        ModelError: there is no such prompt.
    """
    prompts = settings.get("prompts") or {}
    name = settings.get("default_prompt_name") if name is None else name
    if name and name not in prompts:
        raise ModelError(
            f"its {SETTINGS} has no prompt {shorten(name)}; it has: {', '.join(prompts) or 'none'}",
            remedy='name one of these, or "" for no prompt' if prompts else "leave it out, or put it into the texts",
        )
    return str(prompts[name] or "") if name else ""


def ranking_prompts(settings: dict[str, Any]) -> list[str]:
    """The prompts of a query and of its two answers, as sentence-transformers documents ``encode_query`` and
    ``encode_document``; neither uses the default prompt."""
    prompts = settings.get("prompts") or {}
    answer = next((prompts[name] for name in ("document", "passage", "corpus") if prompts.get(name)), "")
    return [str(prompts.get("query") or ""), str(answer), str(answer)]


def _prompt_length(tokenizer: Any, prompt: str) -> int:
    """The number of tokens of a prompt, without a special token at its end (as sentence-transformers counts)."""
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    return len(ids) - int(bool(ids) and ids[-1] in tokenizer.all_special_ids)


def read_score_activation(source: str, config: dict[str, Any]) -> nn.Module:
    """What a cross-encoder applies to its logit, as its files name it; nothing where no file names it.

    Raises:
        ModelError: it is no activation of torch.nn, or the folder has a module or a prompt that is not supported.
    """
    settings = _json(source, SETTINGS) or {}
    named = [settings.get("activation_fn"), (config.get("sentence_transformers") or {}).get("activation_fn")]
    path = next(
        (str(p) for p in [*named, config.get("sbert_ce_default_activation_function")] if p), "torch.nn.Identity"
    )
    activation = getattr(nn, path.rpartition(".")[2], None)
    modules = [str(one.get("type", "")).rpartition(".")[2] for one in _json(source, MODULES) or []]
    wrong = (
        f"the activation {shorten(path)}" if not path.startswith("torch.nn.") or activation is None
        else f"the modules {shorten(', '.join(modules))}" if modules not in ([], ["Transformer"])
        else f"the prompt {shorten(find_prompt(settings))}" if find_prompt(settings) else None
    )  # fmt: skip
    if wrong is not None:
        raise ModelError(f"a cross-encoder with {wrong}, which is not supported", remedy="use another teacher")
    module: nn.Module = activation()  # type: ignore[misc]
    return module


def _pooling(config: dict[str, Any]) -> Pooling:
    given = config.get("pooling_mode")
    if given is None:
        given = [mode for key, mode in POOLINGS.items() if config.get(key)] or ["mean"]
    modes = [given] if isinstance(given, str) else list(given)
    if unknown := set(modes) - set(POOLINGS.values()):
        raise ModelError(f"its pooling {', '.join(sorted(unknown))} is not known", remedy="use another model")
    return Pooling(modes, config.get("include_prompt", True))


def _dense(source: str, path: str) -> DenseLayer:
    layer = DenseLayer(_json(source, f"{path}/config.json") or {})
    layer.load_state_dict(_dense_weights(source, path))
    return layer


def _dense_weights(source: str, path: str) -> dict[str, Tensor]:
    if (file := _file(source, f"{path}/model.safetensors")) is not None:
        return load_file(file)
    if (file := _file(source, f"{path}/pytorch_model.bin")) is not None:
        weights: dict[str, Tensor] = torch.load(file, weights_only=True, map_location="cpu")
        return weights
    raise ModelError(f"{path} has no weights", remedy="download the whole model again")


def _file(source: str, name: str) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(source, name, **missing)
    return None if file is None else Path(file)


def _json(source: str, name: str) -> Any:
    file = _file(source, name)
    return None if file is None else json.loads(file.read_text(encoding="utf-8"))
