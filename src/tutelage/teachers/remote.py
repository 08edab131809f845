"""A teacher behind a server, which gives the largest log-probabilities of next tokens.

Servers get token ids, those that the student reads, and never a text that they would cut anew. What a server says is
believed once it is whole: so many numbers for each position, in the order of the tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch

from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError, EndpointError
from tutelage.servers import JsonClient, JsonRequest, TransientServerError, list_models
from tutelage.taps import Needs
from tutelage.teachers.signal import Signal, Sparse

PREFIXES = 16
"""Beginnings of a text that a llama.cpp server is asked about in one request."""
FORCED = "a"
"""What a llama.cpp server has to generate."""
SAMPLE = "It's 12 o'clock,\n  naïve Ann said: 日本 (x_1 = 3.5)!"
"""Is cut by the server and by the student's tokenizer, which must agree."""


class TopTokens(NamedTuple):
    """What a server says of positions of a text.

    Attributes:
        tokens: ``[n, k]`` ids, the likeliest first.
        log_probs: ``[n, k]``.
    """

    tokens: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float32]


class Dialect(Protocol):
    """How a kind of server is asked."""

    def facts(self, post: JsonRequest, model: str | None) -> dict[str, Any]:
        """``model``, and where the server says so ``vocabulary`` and ``longest``, tokens that it reads at most."""
        ...

    def tokenize(self, post: JsonRequest, model: str | None, text: str) -> list[int] | None:
        """Token ids of a text, with nothing added; ``None`` where the server does not cut."""
        ...

    def top_tokens(self, post: JsonRequest, model: str | None, ids: list[int], at: list[int], k: int) -> TopTokens:
        """The k likeliest tokens to follow each of the positions ``at`` of ``ids``.

        Raises:
            Fault: the answer is not whole.
            EndpointError: no answer ever will be.
        """
        ...


class RemoteTeacher:
    """The k likeliest next tokens of a model behind a server, at T = 1 (``topk``).

    Texts of a batch are asked about side by side, those of packed rows each by itself. A server that cannot be
    reached, is overloaded or answers in part is asked again, for as long as ``max_retry_time`` says; nothing is left
    out or made up.

    Args:
        url: of the server; of vLLM most often with ``/v1`` at its end.
        model: its name there; ``None``: the only one.
        server: ``vllm``, which says the log-probabilities of a prompt in one request; or ``llama.cpp``, which says
            those of generated tokens alone, so that it is asked for one token after each beginning of a text.
        k: how many.
        classes: the student's vocabulary.
        tokenizer: the student's, to compare with the server's.
        longest: tokens of a text, at most.
        key_env: name of the environment variable that holds the key.
        concurrency: most requests at once.
        timeout: seconds for an answer.
        max_retry_time: seconds without an answer after which the server is given up.

    Raises:
        EndpointError: the server refuses, cannot be reached, has no such model, or gives fewer than k.
        CapabilityError: its tokens are not the student's, or texts are too long for it.
    """

    provides = frozenset({"topk"})

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        server: str = "vllm",
        k: int = 20,
        classes: int,
        tokenizer: Any = None,
        longest: int = 0,
        key_env: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        max_retry_time: float = 300.0,
    ) -> None:
        if not 1 <= k <= classes:
            raise CapabilityError(f"k={k} of {classes} tokens", remedy=f"give 1 to {classes}")
        self.url, self.k, self.classes = url.rstrip("/"), k, classes
        self.dialect = SERVERS[server]
        self._server = JsonClient(
            url,
            "teacher.endpoint",
            key_env=key_env,
            concurrency=concurrency,
            timeout=timeout,
            max_retry_time=max_retry_time,
        )
        try:
            facts = self._server.retry(lambda: self.dialect.facts(self._server.post, model))
            self.facts = {"server": server} | facts
            self.model = self.facts["model"]
            self._check(tokenizer, longest)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all connections; what was asked and not answered is dropped."""
        self._server.close()

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """What the server says of the tokens that count.

        Raises:
            CapabilityError: hidden states are needed, or another temperature.
            EndpointError: the server fails.
        """
        if needs.hidden:
            raise CapabilityError("a server gives no hidden states", remedy="use a live teacher, or a term less")
        if needs.temperature not in (None, 1.0):
            raise CapabilityError(
                f"a server gives the distribution at T = 1, and T = {needs.temperature:g} is asked for",
                remedy="set method.temperature to 1: a part of a distribution cannot be softened afterwards",
            )
        batch = batch.for_teacher()
        counted = batch.counted()
        if counted.ndim != 2 or not isinstance(batch.inputs, dict):
            raise CapabilityError("the batch has no tokens to ask about", remedy="use data of task causal")
        index = torch.arange(self.k).expand(*counted.shape, self.k).clone()
        values = torch.full((*counted.shape, self.k), -math.log(self.classes))
        texts = [text for text in split_texts(batch) if text.at]
        asked = [self._server.submit(partial(self._told, text)) for text in texts]
        try:
            for text, answer in zip(texts, asked, strict=True):
                told = answer.result()
                where = torch.tensor(text.at) + text.start
                index[text.row, where] = torch.from_numpy(told.tokens)
                values[text.row, where] = torch.from_numpy(told.log_probs)
        finally:
            for answer in asked:
                answer.cancel()
        device = batch.labels.device
        return Signal(sparse=Sparse("topk", index.to(device), values.to(device), self.classes, 1.0))

    # Asking ----------------------------------------------------------------------------------------------

    def _told(self, text: Text) -> TopTokens:
        told = self.dialect.top_tokens(self._server.post, self.model, text.ids, text.at, self.k)
        if int(told.tokens.max()) >= self.classes:
            raise EndpointError(
                f"names a token {int(told.tokens.max())}, the student scores 0 to {self.classes - 1}",
                where=self.url, remedy="student and teacher must have one tokenizer",
            )  # fmt: skip
        return told

    # Before anything is trained --------------------------------------------------------------------------------

    def _check(self, tokenizer: Any, longest: int) -> None:
        most, vocabulary = self.facts.get("longest"), self.facts.get("vocabulary")
        if most is not None and longest + 1 > most:
            raise CapabilityError(
                f"the server reads {most} tokens, and texts have up to {longest}",
                where=self.url, remedy=f"set data.max_length to {most - 1} at most, or start it with more",
            )  # fmt: skip
        if vocabulary is not None and vocabulary > self.classes:
            raise CapabilityError(
                f"the server's model has {vocabulary} tokens, the student {self.classes}",
                where=self.url, remedy="student and teacher must have one tokenizer",
            )  # fmt: skip
        ids = [0, 1, 2]
        if tokenizer is not None:
            ids = list(tokenizer(SAMPLE, add_special_tokens=False)["input_ids"])
            there = self._server.retry(lambda: self.dialect.tokenize(self._server.post, self.model, SAMPLE))
            if there is not None and there != ids:
                raise CapabilityError(
                    f"the server's tokenizer cuts a text into {there[:6]} ..., the student's into {ids[:6]} ...",
                    where=self.url, remedy="student and teacher must have one tokenizer",
                )  # fmt: skip
        self._server.retry(lambda: self._told(Text(0, 0, ids, list(range(len(ids) - 1)))))


class Text(NamedTuple):
    """A text of a batch.

    Attributes:
        row: of the batch.
        start: where in the row it begins.
        ids: its tokens.
        at: its positions that count, from 0.
    """

    row: int
    start: int
    ids: list[int]
    at: list[int]


def split_texts(batch: Batch) -> list[Text]:
    """Each text of a batch, padding left out; packed rows have several."""
    assert isinstance(batch.inputs, dict)
    ids, counted = batch.inputs["input_ids"].cpu(), batch.counted().cpu()
    positions, attention = batch.inputs.get("position_ids"), batch.inputs.get("attention_mask")
    found = []
    for row in range(len(ids)):
        there = torch.ones(ids.shape[1], dtype=torch.bool) if attention is None else attention[row].cpu().bool()
        begins = [int(there.nonzero()[0])] if bool(there.any()) else []
        if attention is None and positions is not None:
            begins = (positions[row].cpu() == 0).nonzero().flatten().tolist()
        ends = [*begins[1:], int(there.nonzero()[-1]) + 1] if begins else []
        for start, stop in zip(begins, ends, strict=True):
            at = counted[row, start:stop].nonzero().flatten().tolist()
            found.append(Text(row, start, ids[row, start:stop].tolist(), at))
    return found


# Kinds of servers ---------------------------------------------------------------------------------------


class Vllm:
    """vLLM's completions: ``prompt_logprobs`` of token ids.

    The first token has none. Of each other there are the k likeliest, and the token itself where it is not among
    them; how many there may be is set when the server starts (``--max-logprobs``, 20 by default).
    """

    def facts(self, post: JsonRequest, model: str | None) -> dict[str, Any]:
        """From its list of models."""
        there = {str(each["id"]): each for each in list_models(post)}
        name = model if model is not None else next(iter(there), None)
        if name not in there:
            raise EndpointError(
                f"has no model {name!r}", where="teacher.endpoint.model",
                remedy=f"it serves: {', '.join(there) or 'none'}",
            )  # fmt: skip
        longest = there[name].get("max_model_len")
        return {"model": name, **({} if longest is None else {"longest": int(longest)})}

    def tokenize(self, post: JsonRequest, model: str | None, text: str) -> list[int] | None:
        """By ``/tokenize``."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        return _tokens(post, body)

    def top_tokens(self, post: JsonRequest, model: str | None, ids: list[int], at: list[int], k: int) -> TopTokens:
        """One request."""
        # what follows a position is said at the next token; after the last one any will do
        read = [*ids, ids[0]][: at[-1] + 2]
        body = {"model": model, "prompt": read, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        reply = post("completions", body)
        try:
            choices = sorted(reply["choices"], key=lambda each: each["index"])
            said = choices[0].get("prompt_logprobs", reply.get("prompt_logprobs"))
        except (LookupError, TypeError, AttributeError):
            raise TransientServerError(f"answers without choices: {str(reply)[:200]}", answered=True) from None
        if said is None:
            raise EndpointError(
                "says no log-probabilities of a prompt", where="teacher.endpoint.kind",
                remedy="use vLLM, or kind: llama.cpp for a llama.cpp server",
            )  # fmt: skip
        if len(said) != len(read):
            raise TransientServerError(f"says {len(said)} log-probabilities for {len(read)} tokens", answered=True)
        rows = []
        for position in at:
            entry = said[position + 1]
            if not isinstance(entry, dict) or str(read[position + 1]) not in entry:
                raise TransientServerError(f"says of token {position + 1} what is not of that token", answered=True)
            rows.append([(int(token), one["logprob"]) for token, one in entry.items()])
        return select_top_k(rows, k)


class LlamaCpp:
    """llama.cpp's own ``/completion``: of a prompt it says nothing, of one token after it the ``n_probs`` likeliest,
    before any sampling. What it has read of a text is kept from request to request (``cache_prompt``).

    The token itself is always :data:`FORCED`: of one that ends a text or is a part of a character the server would
    keep the probabilities to itself. What it says of the others is of before that.
    """

    def facts(self, post: JsonRequest, model: str | None) -> dict[str, Any]:
        """From its list of models, and its properties."""
        (one, *_) = list_models(post) or [{}]
        meta, props = one.get("meta") or {}, post("/props")
        longest = props.get("default_generation_settings", {}).get("n_ctx") if isinstance(props, dict) else None
        name = model or os.path.basename(str(one.get("id", "")))
        known = {"vocabulary": meta.get("n_vocab"), "longest": longest, "size": meta.get("n_params")}
        return {"model": name, **{key: int(x) for key, x in known.items() if x is not None}}

    def tokenize(self, post: JsonRequest, model: str | None, text: str) -> list[int] | None:
        """By ``/tokenize``."""
        return _tokens(post, {"content": text, "add_special": False})

    def top_tokens(self, post: JsonRequest, model: str | None, ids: list[int], at: list[int], k: int) -> TopTokens:
        """A few positions in each request."""
        rows: list[list[tuple[int, float]]] = []
        for start in range(0, len(at), PREFIXES):
            some = at[start : start + PREFIXES]
            body = {
                "prompt": [ids[: position + 1] for position in some], "n_predict": 1, "n_probs": k,
                "temperature": 0.0, "post_sampling_probs": False, "cache_prompt": True,
                "logit_bias": [[FORCED, 1e4]],
                "response_fields": ["index", "tokens_evaluated", "truncated", "completion_probabilities"],
            }  # fmt: skip
            reply = post("/completion", body)
            answers = sorted(reply if isinstance(reply, list) else [reply], key=lambda one: int(one.get("index", 0)))
            if [int(one.get("index", 0)) for one in answers] != list(range(len(some))):
                raise TransientServerError(f"answers {len(answers)} of {len(some)} prompts", answered=True)
            for position, one in zip(some, answers, strict=True):
                if one.get("tokens_evaluated") != position + 1 or one.get("truncated"):
                    raise EndpointError(
                        f"read {one.get('tokens_evaluated')} tokens where it was given {position + 1}",
                        where="teacher.endpoint", remedy="give it room for a whole text in each slot: --ctx-size",
                    )  # fmt: skip
                said = one.get("completion_probabilities") or [{}]
                rows.append([(int(x["id"]), x["logprob"]) for x in said[0].get("top_logprobs", [])])
        return select_top_k(rows, k)


SERVERS: dict[str, Dialect] = {"llama.cpp": LlamaCpp(), "vllm": Vllm()}
"""Kinds of servers by name."""


def select_top_k(rows: Sequence[Sequence[tuple[int, float | None]]], k: int) -> TopTokens:
    """The k likeliest of each row of (token, log-probability), in any order.

    Raises:
        Fault: there are fewer, or they are no distribution's.
    """
    index, logs = np.zeros((len(rows), k), np.int64), np.zeros((len(rows), k), np.float32)
    for i, row in enumerate(rows):
        known = sorted(((x, t) for t, x in row if x is not None and math.isfinite(x)), reverse=True)[:k]
        if len(known) < k:
            raise TransientServerError(
                f"says {len(known)} log-probabilities of a token where {k} are asked for", answered=True
            )
        logs[i], index[i] = zip(*known, strict=True)
        if len({t for _, t in known}) < k or float(np.exp(logs[i].astype(np.float64)).sum()) > 1.01:
            raise TransientServerError("says log-probabilities that are those of no distribution", answered=True)
    return TopTokens(index, np.minimum(logs, 0.0))


def _tokens(post: JsonRequest, body: Mapping[str, Any]) -> list[int] | None:
    try:
        reply = post("/tokenize", body)
    except EndpointError:
        return None
    found = reply.get("tokens") if isinstance(reply, dict) else None
    return [int(x) for x in found] if isinstance(found, list) else None
