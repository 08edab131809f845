"""The section of a recipe for `tutelage generate`: the data, the endpoint and the budget."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, PrivateAttr, model_validator

from tutelage.config.base import Count, CountOrZero, Fraction, NotNegative, Positive, Section, Seed, by_kind, matching
from tutelage.config.messages import Misfit
from tutelage.errors import shorten

RESERVED = ("model", "messages", "n", "stream", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stop")
"""Fields of a request's body that the recipe's own keys set."""

IN_DEPTH = ("constrain", "deepen", "concretise", "reason", "supply")
"""In-depth operations: how a task gets harder."""

Range = Annotated[list[int], Field(min_length=2, max_length=2)]


def read_prompt(name: str) -> str:
    """A template of the package."""
    return (resources.files("tutelage.config") / "prompts" / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


class EndpointConfig(Section):
    """A server with OpenAI's chat completions API: hosted, vLLM, llama.cpp, `transformers serve` ..."""

    url: str
    """Address in front of ``/chat/completions``, usually ending in ``/v1``. A login in it is used and never
    stored."""
    model: str
    """Name of the model on the server."""
    key_env: str | None = None
    """Name of the environment variable with the API key; a recipe never holds a key. Default: no key is sent."""
    api: Literal["live", "batch"] = "live"
    """``batch``: requests are uploaded as files, polled and downloaded, at half the price and within a day."""
    concurrency: Count = 16
    """Most requests in flight. The first request is sent alone; an overloaded server gets fewer."""
    requests_per_minute: Count | None = None
    """The provider's limit on requests. Default: none."""
    tokens_per_minute: Count | None = None
    """The provider's limit on tokens; a request counts a quarter of its bytes plus all of ``max_tokens``. Default:
    none."""
    timeout: Positive = 120.0
    """Timeout of a request in seconds, all chunks of the answer included."""
    attempts: Count = 6
    """Most calls for one request, after which it is set aside."""
    max_retry_time: Positive = 300.0
    """Seconds of failed calls after which the run stops; a tenth of it if the server never answered."""
    poll: Positive = 30.0
    """Seconds between status requests of a batch."""
    limit_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The server's name for ``sampling.max_tokens``."""

    _login: tuple[str, str] | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _without_secrets(self) -> EndpointConfig:
        example = "give one such as http://127.0.0.1:8000/v1"
        try:
            parts = urlsplit(self.url)
            port = parts.port
        except ValueError:
            raise Misfit([("url", f"is no address; {example}")]) from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Misfit([("url", f"is no http address; {example}")])
        if parts.query or parts.fragment:
            raise Misfit([("url", "has a query; give the address without it, and the key by key_env")])
        if parts.username is not None:
            self._login = (parts.username, parts.password or "")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        place = host if port is None else f"{host}:{port}"
        self.url = urlunsplit((parts.scheme, place, parts.path.rstrip("/"), "", ""))
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            self.key_env = None
            what = "is no name of an environment variable; put the key into one and give the variable's name"
            raise Misfit([("key_env", what)])
        return self

    @property
    def login(self) -> tuple[str, str] | None:
        """User and password that stood in the address."""
        return self._login


class SamplingConfig(Section):
    """How the model samples its answers."""

    temperature: NotNegative | None = 0.7
    """Sampling temperature; ``null``: the server's default."""
    top_p: Fraction | None = None
    """Nucleus sampling: sample from the smallest set of tokens with this probability mass. Default: the server's."""
    max_tokens: Count = 512
    """Most tokens of an answer. Budgets count all of them before a request is sent."""
    stop: list[str] | None = None
    """Strings that end an answer."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request, such as ``{top_k: 40}``."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Extra fields that have a key of their own."""
        for key in [key for key in self.extra if key in RESERVED]:
            yield f"extra.{key}", f"{key!r} is set by the recipe's own keys; remove it"


class PriceConfig(Section):
    """Price of a model's tokens, per million, in any currency."""

    input: NotNegative
    """Price of a million prompt tokens."""
    output: NotNegative
    """Price of a million answer tokens."""


class BudgetConfig(Section):
    """Limits over all runs that share a journal. No request is sent that could exceed one."""

    max_requests: Count | None = None
    """Most calls, failed ones included."""
    max_tokens: Count | None = None
    """Most tokens of prompts and answers together."""
    max_cost: Positive | None = None
    """Most money, by ``prices``."""
    prices: dict[str, PriceConfig] = Field(default_factory=dict)
    """Prices by model name, such as ``{small: {input: 0.15, output: 0.60}}``."""


class DecontaminateConfig(Section):
    """A file of evaluation texts that must not get into the training data."""

    path: str
    """The texts: ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or ``.txt``. All text columns count."""
    words: Count = 10
    """Items that share this many consecutive words with one of the texts are rejected; of a shorter text, all its
    words."""


class QualityConfig(Section):
    """Which items are kept. A change re-reads the journal and sends no request."""

    instruction_words: Range = Field(default_factory=lambda: [3, 200])
    """Fewest and most words of an instruction."""
    answer_words: Range = Field(default_factory=lambda: [1, 2000])
    """Fewest and most words of an answer."""
    language: Annotated[str, matching(r"^[a-z]{2}$", "a code of two small letters, such as en")] | None = None
    """Two-letter language code, such as ``en``. Texts in another language are rejected; texts below five words are
    not checked. Default: any language."""
    refusals: bool = False
    """Keep answers that refuse."""
    truncated: bool = False
    """Keep answers that were cut off at ``max_tokens``."""
    banned: list[str] = Field(default_factory=list)
    """Regular expressions, case-insensitive, that neither instruction nor answer may contain."""
    dedup_threshold: Fraction | None = 0.7
    """Reject an instruction whose ROUGE-L with an earlier kept one is at least this; ``null``: only equal ones."""
    decontaminate: DecontaminateConfig | None = None
    """Texts that must not get into the data. See below."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Wrong ranges and patterns."""
        for key in ("instruction_words", "answer_words"):
            least, most = getattr(self, key)
            if not 0 <= least <= most:
                yield key, f"{key} is [{least}, {most}]; give the fewest, then the most"
        for pattern in self.banned:
            yield from pattern_misfit(pattern, "banned")
        if self.dedup_threshold == 0:
            what = "dedup_threshold is 0, so that all texts are duplicates; give a number above 0, or null"
            yield "dedup_threshold", what


def pattern_misfit(pattern: str, key: str, *, groups: bool = False) -> Iterator[tuple[str, str]]:
    """The misfit of a ``pattern`` that is no regular expression or, with ``groups``, has no group."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        yield key, f"{key} {shorten(pattern)} is no regular expression: {error}; correct it"
        return
    if groups and not compiled.groups:
        yield key, f"{key} {shorten(pattern)} has no group; put brackets around the result"


def price_misfit(budget: BudgetConfig, endpoints: list[EndpointConfig]) -> Iterator[tuple[str, str]]:
    """The misfit of a limit on money without the price of a model."""
    for endpoint in endpoints if budget.max_cost is not None else []:
        if endpoint.model not in budget.prices:
            what = (
                f"budget.max_cost is set, and budget.prices has no {shorten(endpoint.model)}; "
                f"add {endpoint.model}: {{input: ..., output: ...}}"
            )
            yield "budget", what


class BestConfig(Section):
    """How one of several samples is selected."""

    by: Literal["judge", "consistency"]
    """``judge``: the sample with the highest score. ``consistency``: a sample with the most frequent result."""
    judge: EndpointConfig | None = None
    """Endpoint of the judge. Default: the teacher."""
    template: str = read_prompt("score")
    """Template of the judge's prompt, with ``prompt`` and ``answer``."""
    score: str = r"\b(10|[1-9])\b"
    """Regular expression; the first group of its first match is the score."""
    sampling: SamplingConfig = Field(default_factory=lambda: SamplingConfig(temperature=0.0, max_tokens=8))
    """Sampling of the judge."""
    extract: str | None = None
    """For ``consistency``: regular expression; the first group of its last match is the result of an answer. Default:
    no result, and the answer most similar to all others by ROUGE-L is kept."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Wrong patterns."""
        for key, pattern in (("score", self.score), ("extract", self.extract)):
            if pattern is not None:
                yield from pattern_misfit(pattern, key, groups=True)


class GenerateConfig(Section):
    """Settings of `tutelage generate`; `tutelage run` ignores this section. Keys of all kinds:"""

    endpoint: EndpointConfig
    """The teacher. See below."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """Sampling of the answers. See below."""
    system: str | None = None
    """Jinja template of the system message. Default: no system message."""
    user: str = "{{ prompt }}"
    """Jinja template of the user message."""
    samples: Count = 1
    """Number of answers to each prompt. All are kept unless ``best`` selects one."""
    best: BestConfig | None = None
    """How one of the samples is selected. See below."""
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    """Limits on requests, tokens and money. See below."""
    quality: QualityConfig = Field(default_factory=QualityConfig)
    """Which items are kept. See below."""
    held_out: CountOrZero = 0
    """Number of prompts whose conversations go to ``data/test`` and not to the training data; a hash of the prompt's
    text selects them."""
    format: Literal["parquet", "jsonl"] = "parquet"
    """File format of the kept conversations."""
    seed: Seed = 0
    """Seed that selects examples and operations."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """A choice among one sample, or models without a price."""
        if self.best is not None and self.samples < 2:
            yield "best", "best chooses among samples, and there is one; set 'samples' to 2 or more"
        judges = [self.best.judge] if self.best is not None and self.best.judge else []
        yield from price_misfit(self.budget, [self.endpoint, *judges])


class AnswerConfig(GenerateConfig):
    """Answers to given prompts."""

    kind: Literal["answer"] = "answer"
    """What is generated."""
    prompts: str
    """A file of prompts: ``.jsonl``, ``.json``, ``.csv`` or ``.parquet``, whose columns templates can use, or
    ``.txt`` with one ``prompt`` per line. A column ``id`` identifies the prompts."""


class SelfInstructConfig(GenerateConfig):
    """New instructions in the style of a few examples, and answers to them (Wang et al., 2023)."""

    kind: Literal["self-instruct"] = "self-instruct"
    """What is generated."""
    seeds: str | None = None
    """A file of tasks with a column ``instruction``. Default: the 72 tasks of the package."""
    count: Count = 1000
    """Number of new instructions to keep, before they are answered."""
    instruct: str = read_prompt("instruct")
    """Template of the prompt for new tasks, with ``examples``, a list of tasks, and ``number``."""
    instruct_sampling: SamplingConfig = Field(default_factory=lambda: SamplingConfig(temperature=1.0))
    """Sampling of the instructions."""
    examples: Count = 8
    """Number of example tasks in each request: three of four are seeds, the others are kept new tasks."""
    number: Count = 8
    """Number of new tasks that each request asks for."""
    each_round: Count = 32
    """Number of requests of a round; all take their examples from the tasks kept before the round."""
    rounds: Count = 1000
    """Most rounds. Five consecutive rounds without a new instruction also end the generation."""


class EvolveConfig(GenerateConfig):
    """Instructions that get harder or branch off, round by round, and answers to all of them (Xu et al., 2024)."""

    kind: Literal["evolve"] = "evolve"
    """What is generated."""
    prompts: str | None = None
    """A file of tasks with a column ``instruction``. Default: the 72 tasks of the package."""
    rounds: Count = 3
    """Number of evolutions of each task. A task whose evolution failed is tried again from its last version."""
    operations: Annotated[dict[str, str], Field(min_length=1)] = Field(
        default_factory=lambda: {name: read_prompt(name) for name in (*IN_DEPTH, "broaden")}
    )
    """Templates by name, selected with equal probability; each uses ``instruction``. Default: five in-depth
    operations and one in-breadth operation."""
    evolve_sampling: SamplingConfig = Field(default_factory=lambda: SamplingConfig(temperature=1.0))
    """Sampling of the instructions."""


class ConversationConfig(GenerateConfig):
    """Conversations of several turns, in which the teacher also writes the user's messages."""

    kind: Literal["conversation"] = "conversation"
    """What is generated."""
    prompts: str
    """A file of first messages, as in ``kind: answer``."""
    turns: Annotated[int, Field(ge=2)] = 3
    """Number of answers in each conversation."""
    follow_up: str = read_prompt("follow_up")
    """Template of the prompt for the user's next message, with ``messages``, each with ``role`` and ``content``."""
    follow_up_sampling: SamplingConfig = Field(
        default_factory=lambda: SamplingConfig(temperature=1.0, max_tokens=128)
    )
    """Sampling of the user's messages."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Several answers to go on from."""
        yield from super().misfits()
        if self.samples > 1 and self.best is None:
            yield "samples", "a conversation continues from one answer, and there are several; add 'best'"


Generations = AnswerConfig | ConversationConfig | EvolveConfig | SelfInstructConfig

GENERATE_KINDS: dict[str, type[GenerateConfig]] = by_kind(Generations)
"""Every kind of generation that a recipe can name, with its options."""
