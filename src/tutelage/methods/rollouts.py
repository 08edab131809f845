"""Answers of a student from a server, which gets its weights every few steps."""

import copy
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from tutelage.config.methods.language import RolloutsOptions
from tutelage.data.loader import current_rank
from tutelage.errors import CapabilityError, EndpointError, shorten
from tutelage.files import wrap_write_errors
from tutelage.servers import JsonClient, TransientServerError
from tutelage.students.hand_over import (
    change_weights,
    plain_model,
    prompt_log_probs,
    prompt_text,
    shape_of,
    write_plain_model,
)
from tutelage.students.sampling import Completion, ends_of
from tutelage.teachers.protocols import LlamaCppProtocol, VllmProtocol, owners

WHERE = "method.rollouts"
VLLM = VllmProtocol()
PROMPT = 16
"""Tokens of the prompt whose log-probabilities are compared."""
NEAR = 0.1
"""Largest difference between server and student, in parts of the difference that the new weights make."""
NOISE = 5.0
"""Largest difference between server and student, in multiples of that at the start."""
SMALLEST = 1e-3
"""Largest difference in any case."""
LIKELIEST = 5
"""The server's greedy token is one of so many of the student's likeliest tokens."""


class _Weights(NamedTuple):
    """What the server should have loaded.

    Attributes:
        folder: of the weights.
        prompt: some tokens.
        log_probs: the student's log-probabilities of these tokens, with these weights.
        limit: the largest mean difference between them and the server's.
    """

    folder: Path
    prompt: list[int]
    log_probs: Tensor
    limit: float = 0.0


class RolloutClient:
    """Samples answers from a server, with the student's weights of at most ``every`` steps ago.

    Weights are written to a folder, as a plain transformers model (adapters merged), which the server must be able to
    read. The main process writes them and notifies the server; each process requests answers to its own prompts.

    Args:
        options: ``vllm`` takes and returns token ids (``return_token_ids``) and reloads its weights from the folder
            (``reload_weights`` by ``/collective_rpc``). ``openai``, any server with ``/v1/completions``, takes and
            returns text, which is tokenized again, and loads the model whose name is the folder's path.
    """

    def __init__(self, options: RolloutsOptions) -> None:
        self.options = options
        self._client: JsonClient | None = None
        self._facts: dict[str, Any] = {}
        self._folder: Path | None = None
        self._updated: int | None = None
        self._weights: _Weights | None = None
        self._noise = 0.0
        self._template: tuple[nn.Module, ...] = ()  # in a tuple, so that it is no submodule

    def copy_student(self, student: nn.Module) -> None:
        """Copy the student, for the names and types of its weights, on the main process."""
        if self.options.every is not None and current_rank().rank == 0:
            self._template = (copy.deepcopy(student).cpu(),)

    def update(self, student: nn.Module, step: int, temperature: float, prompt: Tensor) -> None:
        """Send the student's weights to the server if they are due, and check that it uses them.

        Before the first weights it gets changed ones, so that a server is seen that keeps some of its own.

        Args:
            student: the model in training; processes that share it must all call this.
            step: optimizer steps done.
            temperature: of the sampling.
            prompt: tokens whose log-probabilities are compared.

        Raises:
            EndpointError: the server does not load them.
        """
        every = self.options.every
        if every is None or (self._updated is not None and step - self._updated < every):
            return
        self._server_facts()
        state: Any = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        self._updated = step
        if current_rank().rank == 0:
            (template,), ends = self._template, ends_of(student)
            if self._weights is None:
                model = plain_model(template, state)
                self._check_shape(model)
                ids = [*prompt[:PROMPT].tolist(), int(prompt[0])]
                before = _Weights(self._step_folder("changed"), ids, prompt_log_probs(model, ids))
                change_weights(model)
                before = self._hand_over(model, before, before.folder, ends, temperature)
            folder, model = self._step_folder(f"{step:09d}"), plain_model(template, state)
            self._weights = self._hand_over(model, self._weights or before, folder, ends, temperature)
        if current_rank().world > 1:
            shared = [self._folder, self._weights]
            dist.broadcast_object_list(shared)
            self._folder, self._weights = shared  # type: ignore[assignment]

    def check(
        self, student: nn.Module, prompt: Tensor, temperature: float, longest: int, max_new_tokens: int
    ) -> None:
        """Check the server's context for the longest prompt and answer, send the weights, and sample one token."""
        self._check_context(longest, max_new_tokens)
        self.update(student, 0, temperature, prompt)
        self.sample_completions(student, [prompt], max_new_tokens=1, temperature=temperature)

    def sample_completions(
        self, student: nn.Module, prompts: Sequence[Tensor], *, max_new_tokens: int, temperature: float
    ) -> list[Completion]:
        """As :func:`tutelage.students.sampling.sample_completions`; ``student`` provides the tokenizer.

        A server that was restarted meanwhile has lost the weights: it gets them again, and samples again.

        Raises:
            EndpointError: the server fails for longer than ``max_retry_time``, or cuts an answer.
            CapabilityError: the server takes text, and the student has no tokenizer; or a prompt is too long.
        """
        tokenizer: Any = getattr(student, "tokenizer", None)
        if self.options.kind == "openai" and tokenizer is None:
            raise CapabilityError(
                f"{type(student).__name__} has no tokenizer, and the server reads text",
                where=f"{WHERE}.kind",
                remedy="load the student with its tokenizer, or use vLLM, which reads token ids",
            )
        self._check_context(max(len(p) for p in prompts), max_new_tokens)
        options = {"max_tokens": max_new_tokens, "temperature": temperature}
        completions = self._sample(prompts, ends_of(student), tokenizer, options)
        if self._weights is None or self.options.kind != "vllm":
            return completions
        if self._gap(self._weights) > self._weights.limit:
            VLLM.load_weights(self._open(), self._weights.folder)
            completions = self._sample(prompts, ends_of(student), tokenizer, options)
            self._compare(self._weights)
        return completions

    def _sample(
        self, prompts: Sequence[Tensor], ends: list[int], tokenizer: Any, options: dict[str, Any]
    ) -> list[Completion]:
        client, request = self._open(), self._vllm if self.options.kind == "vllm" else self._openai
        body = {"model": self._name(), **options, "top_p": 1.0}
        futures = [client.submit(partial(request, client, body, p.tolist(), ends, tokenizer)) for p in prompts]
        completions = []
        try:
            for prompt, future in zip(prompts, futures, strict=True):
                ids = future.result()
                stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
                answer = torch.tensor(
                    ids[: min(stop, options["max_tokens"])], dtype=prompt.dtype, device=prompt.device
                )
                completions.append(Completion(torch.cat([prompt, answer]), len(prompt)))
        finally:
            for future in futures:
                future.cancel()
        return completions

    # Kinds of servers --------------------------------------------------------------------------------------------

    def _vllm(
        self, client: JsonClient, body: dict[str, Any], prompt: list[int], ends: list[int], tokenizer: Any
    ) -> list[int]:
        sampling = {**VLLM.plain_sampling, "stop_token_ids": ends, "return_token_ids": True}
        choice = _choice(client.post("completions", {**body, **sampling, "prompt": prompt}), body["max_tokens"])
        ids = choice.get("token_ids")
        if ids is None:
            raise EndpointError(
                "returns no token ids of its answer", where=WHERE,
                remedy="use vLLM 0.10.2 or newer, or kind: openai for a server that returns text only",
            )  # fmt: skip
        return _with_end([int(x) for x in ids], choice, ends)

    def _openai(
        self, client: JsonClient, body: dict[str, Any], prompt: list[int], ends: list[int], tokenizer: Any
    ) -> list[int]:
        sampling: dict[str, Any] = self._server_facts().get("sampling", {})
        reply = client.post("completions", {**body, **sampling, "prompt": prompt_text(tokenizer, prompt)})
        choice = _choice(reply, body["max_tokens"])
        ids = tokenizer(choice.get("text") or "", add_special_tokens=False)["input_ids"]
        return _with_end(list(ids), choice, ends)

    def _server_facts(self) -> dict[str, Any]:
        """``model`` and ``longest`` as in protocols; ``sampling``: settings of a request, for kind ``openai``."""
        if not self._facts:
            client, model = self._open(), self.options.model
            if self.options.kind == "vllm":
                self._facts = client.retry(lambda: VLLM.facts(client, model))
                return self._facts
            models = client.retry(client.models)
            owned_by = owners(models)
            facts: dict[str, Any] = {"model": model}
            if "llamacpp" in owned_by:
                if not client.url.endswith("/v1"):  # its models are there too, and its completions are others
                    raise client.missing_v1()
                if self.options.every is not None:
                    raise EndpointError(
                        "a llama.cpp server loads no weights while it runs", where=f"{WHERE}.every",
                        remedy="use vLLM or transformers serve; or set every: null and name the model",
                    )  # fmt: skip
                facts |= client.retry(lambda: LlamaCppProtocol().facts(client, model))
                facts["sampling"] = LlamaCppProtocol.plain_sampling
            elif "vllm" in owned_by:
                if self.options.every is not None:
                    raise EndpointError(
                        "a vLLM server loads no model by the path of its folder", where=f"{WHERE}.kind",
                        remedy="set kind: vllm; or set every: null and name the model",
                    )  # fmt: skip
                facts |= client.retry(lambda: VLLM.facts(client, model))
                facts["sampling"] = {**VLLM.plain_sampling, "ignore_eos": False}
            self._facts = facts
        return self._facts

    def _check_context(self, longest: int, max_new_tokens: int) -> None:
        most = self._server_facts().get("longest")
        if most is not None and longest + max_new_tokens > most:
            raise CapabilityError(
                f"the server's context has {most} tokens; the longest prompt has {longest}, and its answer may have "
                f"{max_new_tokens}",
                where=self.options.url,
                remedy=f"set method.max_new_tokens to {most - longest} at most, or method.max_prompt_tokens to "
                f"{most - max_new_tokens}; or start the server with a larger context"
                if longest < most > max_new_tokens
                else "start the server with a larger context, or lower method.max_prompt_tokens and "
                "method.max_new_tokens",
            )

    # Weights -----------------------------------------------------------------------------------------------------

    def _hand_over(self, model: Any, before: _Weights, folder: Path, ends: list[int], temperature: float) -> _Weights:
        """Write the model, let the server load it in place of ``before``, and compare."""
        is_vllm, prompt = self.options.kind == "vllm", before.prompt
        log_probs = prompt_log_probs(model, prompt)
        change = float((log_probs - before.log_probs).abs().mean())
        weights = _Weights(folder, prompt, log_probs, max(NEAR * change, NOISE * self._noise + SMALLEST))
        write_plain_model(model, folder, ends, temperature, untie=is_vllm)
        if is_vllm:
            VLLM.load_weights(self._open(), folder)
            gap = self._compare(weights)
            if self._weights is None:
                self._noise = max(self._noise, gap)
        else:
            self._compare_greedy(model, weights)
        if before.folder != folder:
            shutil.rmtree(before.folder, ignore_errors=True)
        return weights

    def _gap(self, weights: _Weights) -> float:
        """The mean difference between the log-probabilities of server and student."""
        client, name = self._open(), self._name()
        log_probs = client.retry(lambda: VLLM.log_probs(client, name, weights.prompt))
        return float((torch.tensor(log_probs) - weights.log_probs).abs().mean())

    def _compare(self, weights: _Weights) -> float:
        if (gap := self._gap(weights)) > weights.limit:
            raise EndpointError(
                "the server does not use the weights that it has loaded: its log-probabilities of a prompt differ "
                f"from the student's by {gap:.3g} on average ({weights.limit:.2g} is allowed)",
                where=self.options.url,
                remedy="serve the student's model without quantization, with a vLLM that updates all weights, such "
                "as 0.32; or leave rollouts out: the student then samples in this process",
            )
        return gap

    def _compare_greedy(self, model: Any, weights: _Weights) -> None:
        """Compare the first greedy token of server and student, for servers without log-probabilities."""
        client, tokenizer = self._open(), model.tokenizer
        text = prompt_text(tokenizer, weights.prompt)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
        likeliest = [tokenizer.decode([token], skip_special_tokens=True) for token in logits.topk(LIKELIEST).indices]
        body = {"model": str(weights.folder), "prompt": text, "max_tokens": 4, "temperature": 0.0, "top_p": 1.0}
        answer = client.retry(lambda: str(_choice(client.post("completions", body), 4).get("text") or ""))
        if not any("\ufffd" in x or (answer.strip().startswith(x.strip()) and (x or not answer)) for x in likeliest):
            raise EndpointError(
                f"the server does not use the model of the request: its greedy answer begins with "
                f"{shorten(answer)}, but the student's likeliest tokens are {shorten(likeliest)}",
                where=self.options.url,
                remedy="use a server that loads a model by the path of its folder, as transformers serve does",
            )

    def _check_shape(self, model: Any) -> None:
        """Check layers, hidden size and vocabulary first: vLLM does not survive weights of other shapes."""
        if self.options.kind != "vllm":
            return
        own, other = shape_of(model), VLLM.shape(self._open())
        for name in own.keys() & other.keys():
            if own[name] != other[name]:
                raise EndpointError(
                    f"the server's model has another shape: {name} {other[name]}, and the student has {own[name]}",
                    where=self.options.url,
                    remedy="save the student, and start vLLM with its folder",
                )

    def _step_folder(self, name: str) -> Path:
        if self._folder is None:
            parent = self.options.folder
            with wrap_write_errors(Path(parent or tempfile.gettempdir())):
                if parent is not None:
                    Path(parent).mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix="tutelage-rollouts-", dir=parent)).resolve()
                self._folder.chmod(0o755)  # the server may run as another user
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder / f"step-{name}"

    def _open(self) -> JsonClient:
        if self._client is None:
            o = self.options
            self._client = JsonClient(
                o.url, WHERE, key_env=o.key_env, concurrency=o.concurrency, timeout=o.timeout,
                max_retry_time=o.max_retry_time,
            )  # fmt: skip
            weakref.finalize(self, self._client.close)
        return self._client

    def _name(self) -> str:
        if self.options.kind == "openai" and self._weights is not None:
            return str(self._weights.folder)
        return str(self._server_facts()["model"])


def _choice(reply: Any, max_new_tokens: int) -> dict[str, Any]:
    """The only choice of a completion.

    Raises:
        TransientServerError: there is none.
        EndpointError: it is cut before ``max_new_tokens``.
    """
    try:
        choice = reply["choices"][0]
        reason = choice["finish_reason"]
    except (LookupError, TypeError):
        raise TransientServerError(f"the reply has no choice: {shorten(reply)}", answered=True) from None
    if reason not in ("stop", "length"):
        raise TransientServerError(f"stops an answer early ({reason})", answered=True)
    tokens = choice.get("token_ids")
    count = (reply.get("usage") or {}).get("completion_tokens") if tokens is None else len(tokens)
    if reason == "length" and count is not None and count < max_new_tokens:
        raise EndpointError(
            f"the server cuts an answer after {count} of {max_new_tokens} tokens", where=WHERE,
            remedy="start it with a larger context, or lower method.max_new_tokens",
        )  # fmt: skip
    return dict(choice)


def _with_end(ids: list[int], choice: dict[str, Any], ends: list[int]) -> list[int]:
    """An answer with its end token, which servers may omit."""
    if choice["finish_reason"] == "stop" and ends and not any(token in ends for token in ids):
        return [*ids, ends[0]]
    if not ids:
        raise TransientServerError("returns an empty answer", answered=True)
    return ids
