"""The requests and replies of vLLM and llama.cpp that a remote teacher and rollouts need."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from tutelage.errors import EndpointError, shorten
from tutelage.servers import JsonClient, JsonRequest, TransientServerError

PROMPTS_PER_REQUEST = 16
"""Prefixes of a text in one request to a llama.cpp server."""
FORCED_TOKEN = "a"
"""The token that a llama.cpp server has to generate."""

LARGEST = 1e-3
"""The largest log-probability; above 0 for rounding."""
NO_DISTRIBUTION = "returns log-probabilities that form no distribution: start vLLM with --logprobs-mode raw_logprobs"

TopTokens = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""``[n, k]`` ids of the likeliest tokens at n positions, the likeliest first, and their log-probabilities."""


class VllmProtocol:
    """vLLM's completions, with ``prompt_logprobs`` of token ids.

    The first token has none. Each other token has the k likeliest and itself. The largest k is set when the server
    starts (``--max-logprobs``, 20 by default).
    """

    plain_sampling: ClassVar[dict[str, Any]] = {
        "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "ignore_eos": True,
    }  # fmt: skip
    """Every setting that vLLM otherwise takes from the ``generation_config.json`` of its model."""

    def facts(self, client: JsonClient, model: str | None) -> dict[str, Any]:
        """``model``, and ``longest``, the size of its context, as far as the server states it."""
        models = client.models()
        if "llamacpp" in owners(models):
            raise EndpointError(
                "this is a llama.cpp server, but the kind is vllm", where=f"{client.where}.kind",
                remedy="start vLLM" if "rollouts" in client.where else "set kind: llama.cpp, or start vLLM",
            )  # fmt: skip
        name = model if model is not None else next(iter(models), None)
        if name not in models:
            raise EndpointError(
                f"the server has no model {shorten(name)}", where=f"{client.where}.model",
                remedy=f"it serves: {', '.join(models) or 'none'}",
            )  # fmt: skip
        longest = models[name].get("max_model_len")
        return {"model": name, **({} if longest is None else {"longest": int(longest)})}

    def tokenize(self, client: JsonClient, model: str | None, text: str) -> list[int] | None:
        """Token ids of a text without special tokens; ``None`` if the server has no such endpoint."""
        return _tokenize(client.post, {"model": model, "prompt": text, "add_special_tokens": False})

    def top_tokens(self, client: JsonClient, model: str | None, ids: list[int], at: list[int], k: int) -> TopTokens:
        """The k likeliest tokens after each of the positions ``at`` of ``ids``."""
        # the entry of a token has the distribution after the position before it; after the last one any token will do
        entries = self._entries(client, model, [*ids, ids[0]][: at[-1] + 2], k)
        return _select_top_k([[(int(t), x["logprob"]) for t, x in entries[i].items()] for i in at], k)

    def log_probs(self, client: JsonClient, model: str | None, ids: list[int]) -> list[float]:
        """The log-probability of each token of ``ids`` but the first."""
        values = [
            float(entry[str(token)]["logprob"])
            for token, entry in zip(ids[1:], self._entries(client, model, ids, 1), strict=True)
        ]
        if max(values) > LARGEST:
            raise TransientServerError(NO_DISTRIBUTION, answered=True)
        return values

    def load_weights(self, client: JsonClient, folder: Path) -> None:
        """Load the weights of a folder into the model."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            client.retry(partial(_send_once, client, "/collective_rpc", body))
            client.retry(partial(_send_once, client, "/reset_prefix_cache", {}))
        except EndpointError as error:
            raise EndpointError(
                f"cannot load the student's weights: {error.what}",
                where=client.url,
                remedy="start vLLM, a version whose reload_weights takes weights_path, with VLLM_SERVER_DEV_MODE=1 "
                f"and the student's model; it must be able to read {folder}",
            ) from None

    def shape(self, client: JsonClient) -> dict[str, int]:
        """Layers, hidden size and vocabulary of its model, as far as its development mode shows them."""
        try:
            (text, *_) = client.post("/collective_rpc", {"method": "get_model_inspection"})["results"]
        except (EndpointError, TransientServerError, LookupError, TypeError, ValueError):
            return {}
        shape: dict[str, int] = {}
        if embedding := re.search(r"Embedding\(num_embeddings=(\d+).*?embedding_dim=(\d+)", str(text)):
            shape |= {"vocabulary": int(embedding[1]), "hidden size": int(embedding[2])}
        if layers := re.search(r"^( *)\(\w+\): ModuleList\(.*\n((?:\1  .*\n)+)", str(text), re.MULTILINE):
            numbers = re.findall(rf"^{layers[1]}  \((?:\d+-)?(\d+)\): ", layers[2], re.MULTILINE)
            shape["layers"] = max(map(int, numbers), default=-1) + 1
        return shape

    def _entries(self, client: JsonClient, model: str | None, prompt: list[int], k: int) -> list[dict[str, Any]]:
        """The entry of each token of a prompt but the first."""
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        reply = client.post("completions", body)
        try:
            choices = sorted(reply["choices"], key=lambda each: each["index"])
            entries = choices[0].get("prompt_logprobs", reply.get("prompt_logprobs"))
        except (LookupError, TypeError, AttributeError):
            raise TransientServerError(f"replies without choices: {shorten(reply)}", answered=True) from None
        if entries is None:
            raise EndpointError(
                "the server returns no log-probabilities of a prompt", where=f"{client.where}.kind",
                remedy="use vLLM, or kind: llama.cpp for a llama.cpp server",
            )  # fmt: skip
        if len(entries) != len(prompt):
            raise TransientServerError(
                f"returns {len(entries)} log-probabilities for {len(prompt)} tokens", answered=True
            )
        for i, (token, entry) in enumerate(zip(prompt[1:], entries[1:], strict=True), start=1):
            if not isinstance(entry, dict) or str(token) not in entry:
                raise TransientServerError(
                    f"returns the log-probabilities of another token for token {i}", answered=True
                )
        return list(entries[1:])


class LlamaCppProtocol:
    """llama.cpp's ``/completion``, which returns the ``n_probs`` likeliest tokens only for a generated token.

    Each prefix of a text is a prompt, and the server generates one token after it; it reuses the prefix that it has
    read (``cache_prompt``). The generated token is always :data:`FORCED_TOKEN`, since the server omits the
    probabilities of a token that ends a text or is part of a character. Probabilities are those before any sampling.
    """

    plain_sampling: ClassVar[dict[str, Any]] = {
        "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "samplers": ["temperature"],
    }  # fmt: skip
    """Settings that override those of the server, which are not neutral (``min_p`` 0.05, ``top_k`` 40)."""

    def facts(self, client: JsonClient, model: str | None) -> dict[str, Any]:
        """``model``, and as far as the server states them ``vocabulary``, ``longest`` and ``size``."""
        models = client.models()
        if "vllm" in owners(models):
            raise EndpointError(
                "this is a vLLM server, but the kind is llama.cpp", where=f"{client.where}.kind",
                remedy="set kind: vllm",
            )  # fmt: skip
        first = next(iter(models.values()), {})
        meta, props = first.get("meta") or {}, client.post("/props")
        longest = props.get("default_generation_settings", {}).get("n_ctx") if isinstance(props, dict) else None
        name = model or os.path.basename(str(first.get("id", "")))
        known = {"vocabulary": meta.get("n_vocab"), "longest": longest, "size": meta.get("n_params")}
        return {"model": name, **{key: int(x) for key, x in known.items() if x is not None}}

    def tokenize(self, client: JsonClient, model: str | None, text: str) -> list[int] | None:
        """Token ids of a text without special tokens."""
        return _tokenize(client.post, {"content": text, "add_special": False})

    def top_tokens(self, client: JsonClient, model: str | None, ids: list[int], at: list[int], k: int) -> TopTokens:
        """The k likeliest tokens after each of the positions ``at`` of ``ids``."""
        rows: list[list[tuple[int, float | None]]] = []
        for start in range(0, len(at), PROMPTS_PER_REQUEST):
            positions = at[start : start + PROMPTS_PER_REQUEST]
            body = {
                "prompt": [ids[: position + 1] for position in positions], "n_predict": 1, "n_probs": k,
                "temperature": 0.0, "post_sampling_probs": False, "cache_prompt": True,
                "logit_bias": [[FORCED_TOKEN, 1e4]],
                "response_fields": ["index", "tokens_evaluated", "truncated", "completion_probabilities"],
            }  # fmt: skip
            reply = client.post("/completion", body)
            answers = sorted(reply if isinstance(reply, list) else [reply], key=lambda one: int(one.get("index", 0)))
            if [int(one.get("index", 0)) for one in answers] != list(range(len(positions))):
                raise TransientServerError(f"replies to {len(answers)} of {len(positions)} prompts", answered=True)
            for position, answer in zip(positions, answers, strict=True):
                if answer.get("tokens_evaluated") != position + 1 or answer.get("truncated"):
                    raise EndpointError(
                        f"the server read {answer.get('tokens_evaluated')} of {position + 1} tokens",
                        where=client.where,
                        remedy="start it with a larger --ctx-size: each slot must hold a complete text",
                    )
                top = (answer.get("completion_probabilities") or [{}])[0].get("top_logprobs", [])
                rows.append([(int(x["id"]), x["logprob"]) for x in top])
        return _select_top_k(rows, k)


PROTOCOLS: dict[str, VllmProtocol | LlamaCppProtocol] = {"llama.cpp": LlamaCppProtocol(), "vllm": VllmProtocol()}
"""Protocols by the kind of server."""


def owners(models: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Who owns a server's models: ``vllm`` and ``llamacpp`` name the server."""
    return {str(each.get("owned_by")) for each in models.values()}


def _select_top_k(rows: Sequence[Sequence[tuple[int, float | None]]], k: int) -> TopTokens:
    """The k likeliest tokens of each row of (token, log-probability), in any order."""
    index, logs = np.zeros((len(rows), k), np.int64), np.zeros((len(rows), k), np.float32)
    for i, row in enumerate(rows):
        finite = sorted(((x, t) for t, x in row if x is not None and math.isfinite(x)), reverse=True)[:k]
        if len(finite) < k:
            raise TransientServerError(
                f"returns {len(finite)} log-probabilities for a position, and k is {k}", answered=True
            )
        logs[i], index[i] = zip(*finite, strict=True)
        if len({t for _, t in finite}) < k or float(np.exp(logs[i].astype(np.float64)).sum()) > 1.01:
            raise TransientServerError(NO_DISTRIBUTION, answered=True)
    return index, np.minimum(logs, 0.0)


def _tokenize(post: JsonRequest, body: Mapping[str, Any]) -> list[int] | None:
    try:
        reply = post("/tokenize", body)
    except EndpointError:
        return None
    tokens = reply.get("tokens") if isinstance(reply, dict) else None
    return [int(x) for x in tokens] if isinstance(tokens, list) else None


def _send_once(client: JsonClient, path: str, body: dict[str, Any]) -> None:
    """Send a request that vLLM does not survive if it fails, and check that it succeeds."""
    try:
        reply = client.send(path, body)
    except TransientServerError as error:
        if error.status == 500:
            raise EndpointError(error.what) from None
        raise
    if '"success":false' in reply.text.replace(" ", ""):
        raise TransientServerError("keeps its prefix cache", answered=True)
