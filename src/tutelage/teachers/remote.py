"""A teacher behind a server that provides the top-k log-probabilities of next tokens.

Requests contain the student's token ids and no text, so the server does not tokenize. A reply is used only if it
has k finite log-probabilities for each position, in the order of the tokens.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError, EndpointError, TutelageError
from tutelage.servers import JsonClient, TransientServerError
from tutelage.taps import Needs
from tutelage.teachers.protocols import NO_DISTRIBUTION, PROTOCOLS, TopTokens
from tutelage.teachers.signal import Signal, Sparse

SAMPLE = "It's 12 o'clock,\n  naïve Ann said: 日本 (x_1 = 3.5)!"
"""A text that the tokenizers of server and student must tokenize in the same way."""

LEAST_MASS = 0.99
"""Probabilities of all tokens, padding included, if each that is omitted is as likely as the last in the reply."""


class RemoteTeacher(AbstractContextManager["RemoteTeacher"]):
    """The k likeliest next tokens from a model behind a server, at T = 1 (``topk``).

    The texts of a batch are requested in parallel; each text of a packed row is a request of its own. Requests are
    retried for ``max_retry_time`` if the server is unreachable, overloaded or replies incompletely. No position is
    left out or filled in.

    Args:
        url: of the server; vLLM's usually ends in ``/v1``.
        model: its name on the server. Default: the only one.
        server: ``vllm``, which returns the log-probabilities of a prompt in one request; or ``llama.cpp``, which
            returns those of generated tokens only, so that each prefix of a text is a prompt.
        k: number of tokens per position.
        classes: tokens of the student's vocabulary, without padding.
        tokenizer: the student's, for a comparison with the server's.
        longest: tokens of the longest text.
        key_env: name of the environment variable with the API key.
        concurrency: largest number of parallel requests.
        timeout: seconds for one reply.
        max_retry_time: seconds of retries without a reply.

    Raises:
        EndpointError: the server refuses, is unreachable, does not have the model, or returns fewer than k tokens.
        CapabilityError: tokenizer or vocabulary differ from the student's, or texts are too long for the server.
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
            raise CapabilityError(
                f"k is {k}, and the vocabulary has {classes} tokens", remedy=f"set k to 1 to {classes}"
            )
        self.url, self.k, self.classes = url.rstrip("/"), k, classes
        self.kind = PROTOCOLS[server]
        options: dict[str, Any] = {"concurrency": concurrency, "timeout": timeout, "max_retry_time": max_retry_time}
        self._server = JsonClient(url, "teacher.endpoint", key_env=key_env, **options)
        try:
            facts = self._server.retry(lambda: self.kind.facts(self._server, model))
            self.facts = {"server": server} | facts
            self.model = self.facts["model"]
            self._check(tokenizer, longest)
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; pending requests are dropped."""
        self._server.close()

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """The top-k distributions at the counted tokens; other positions are uniform.

        Raises:
            CapabilityError: hidden states or another temperature are needed.
            EndpointError: the server fails.
        """
        if needs.hidden:
            raise CapabilityError(
                "a remote teacher provides no hidden states", remedy="use a live teacher, or a method on logits"
            )
        if needs.temperature not in (None, 1.0):
            raise CapabilityError(
                f"a remote teacher provides distributions at T = 1, and the method needs T = {needs.temperature:g}",
                remedy="set method.temperature to 1: a sparse distribution has one temperature",
            )
        batch = batch.for_teacher()
        counted = batch.counted()
        if counted.ndim != 2 or not isinstance(batch.inputs, dict):
            raise CapabilityError("the batch has no tokens for the server", remedy="use data with task: causal")
        index = torch.arange(self.k).expand(*counted.shape, self.k).clone()
        values = torch.full((*counted.shape, self.k), -math.log(self.classes))
        texts = [text for text in _split_texts(batch) if text.at]
        replies = [self._server.submit(partial(self._top_tokens, text)) for text in texts]
        try:
            for text, reply in zip(texts, replies, strict=True):
                tokens, log_probs = reply.result()
                where = torch.tensor(text.at) + text.start
                index[text.row, where] = torch.from_numpy(tokens)
                values[text.row, where] = torch.from_numpy(log_probs)
        finally:
            for reply in replies:
                reply.cancel()
        device = batch.labels.device
        return Signal(sparse=Sparse("topk", index.to(device), values.to(device), self.classes, 1.0))

    def _top_tokens(self, text: _Text) -> TopTokens:
        top = self.kind.top_tokens(self._server, self.model, text.ids, text.at, self.k)
        if (largest := int(top[0].max())) >= self.classes:
            raise self._other_tokenizer(
                f"the server returned token id {largest}, and the student's vocabulary has {self.classes} tokens",
                EndpointError,
            )
        mass = np.exp(top[1].astype(np.float64))
        if float((mass.sum(1) + mass[:, -1] * 2 * self.classes).min()) < LEAST_MASS:
            raise TransientServerError(NO_DISTRIBUTION, answered=True)
        return top

    def _check(self, tokenizer: Any, longest: int) -> None:
        """Check the server before training: context size, vocabulary, tokenizer, and one small request."""
        most, vocabulary = self.facts.get("longest"), self.facts.get("vocabulary")
        if most is not None and longest + 1 > most:
            raise CapabilityError(
                f"the server's context has {most} tokens, and texts have up to {longest}",
                where=self.url,
                remedy=f"set data.max_length to {most - 1} at most, or start the server with a larger context",
            )
        known = tokenizer is not None and len(tokenizer) <= self.classes  # then more tokens of the server are padding
        if vocabulary is not None and (vocabulary < self.classes or (vocabulary > self.classes and not known)):
            raise self._other_tokenizer(
                f"the vocabulary of the server's model has {vocabulary} tokens, that of the student {self.classes}"
            )
        ids = [0, 1, 2]
        if tokenizer is not None:
            ids = list(tokenizer(SAMPLE, add_special_tokens=False)["input_ids"])
            there = self._server.retry(lambda: self.kind.tokenize(self._server, self.model, SAMPLE))
            if there is not None and there != ids:
                raise self._other_tokenizer(
                    f"the server's tokenizer encodes a sample text as {there[:6]} ..., the student's as {ids[:6]} ..."
                )
        self._server.retry(lambda: self._top_tokens(_Text(0, 0, ids, list(range(len(ids) - 1)))))

    def _other_tokenizer(self, what: str, kind: type[TutelageError] = CapabilityError) -> TutelageError:
        return kind(what, where=self.url, remedy="use a teacher and a student with the same tokenizer")


class _Text(NamedTuple):
    """A text: its row in the batch, its first position there, its tokens, and its counted positions, from 0."""

    row: int
    start: int
    ids: list[int]
    at: list[int]


def _split_texts(batch: Batch) -> list[_Text]:
    """The texts of a batch, without padding; packed rows have several."""
    assert isinstance(batch.inputs, dict)
    ids, counted = batch.inputs["input_ids"].cpu(), batch.counted().cpu()
    positions, attention = batch.inputs.get("position_ids"), batch.inputs.get("attention_mask")
    texts = []
    for row in range(len(ids)):
        real = torch.ones(ids.shape[1], dtype=torch.bool) if attention is None else attention[row].cpu().bool()
        begins = [int(real.nonzero()[0])] if bool(real.any()) else []
        if attention is None and positions is not None:
            begins = (positions[row].cpu() == 0).nonzero().flatten().tolist()
        ends = [*begins[1:], int(real.nonzero()[-1]) + 1] if begins else []
        for start, stop in zip(begins, ends, strict=True):
            at = counted[row, start:stop].nonzero().flatten().tolist()
            texts.append(_Text(row, start, ids[row, start:stop].tolist(), at))
    return texts
