"""Answers of a student from a server, which gets its weights every few steps."""

import copy
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from tutelage.config.methods.language import RolloutsOptions
from tutelage.data.loader import current_rank
from tutelage.errors import CapabilityError, EndpointError, shorten
from tutelage.files import silence_transformers, wrap_write_errors
from tutelage.methods.sampling import Completion, ends_of
from tutelage.servers import JsonClient, TransientServerError, list_models
from tutelage.students import to_float_model

WHERE = "method.rollouts"


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
        self.options, self.model = options, options.model
        self._client: JsonClient | None = None
        self._folder: Path | None = None
        self._updated: int | None = None
        self._template: tuple[nn.Module, ...] = ()  # in a tuple, so that it is no submodule

    def copy_student(self, student: nn.Module) -> None:
        """Copy the student, for the names and types of its weights, on the main process."""
        if self.options.every is not None and current_rank().rank == 0:
            self._template = (copy.deepcopy(student).cpu(),)

    def update(self, student: nn.Module, step: int, temperature: float) -> None:
        """Send the student's weights to the server if they are due.

        Args:
            student: the model in training; processes that share it must all call this.
            step: optimizer steps done.
            temperature: of the sampling.

        Raises:
            EndpointError: the server does not load them.
        """
        every = self.options.every
        if every is None or (self._updated is not None and step - self._updated < every):
            return
        state = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        before, self._updated = self._updated, step
        if current_rank().rank == 0:
            self._write(state, self._step_folder(step), ends_of(student), temperature)
            if self.options.kind == "vllm":
                self._reload(self._step_folder(step))
            if before is not None:
                shutil.rmtree(self._step_folder(before), ignore_errors=True)
        if current_rank().world > 1:
            folder = [None if self._folder is None else str(self._folder)]
            dist.broadcast_object_list(folder)
            self._folder = Path(str(folder[0]))

    def check(self, student: nn.Module, prompt: Tensor, temperature: float) -> None:
        """Send the weights and sample one token; raises as both do."""
        self.update(student, 0, temperature)
        self.sample_completions(student, [prompt], max_new_tokens=1, temperature=temperature)

    def sample_completions(
        self, student: nn.Module, prompts: Sequence[Tensor], *, max_new_tokens: int, temperature: float
    ) -> list[Completion]:
        """As :func:`tutelage.methods.sampling.sample_completions`; ``student`` provides the tokenizer.

        Raises:
            EndpointError: the server fails for longer than ``max_retry_time``.
            CapabilityError: the server takes text, and the student has no tokenizer.
        """
        is_vllm = self.options.kind == "vllm"
        ends, request = ends_of(student), self._vllm if is_vllm else self._openai
        tokenizer: Any = getattr(student, "tokenizer", None)
        if not is_vllm and tokenizer is None:
            raise CapabilityError(
                f"{type(student).__name__} has no tokenizer, and the server reads text",
                where=f"{WHERE}.kind",
                remedy="load the student with its tokenizer, or use vLLM, which reads token ids",
            )
        client = self._open()
        body = {"model": self._name(), "max_tokens": max_new_tokens, "temperature": temperature, "top_p": 1.0}
        futures = [client.submit(partial(request, client, body, p.tolist(), ends, tokenizer)) for p in prompts]
        completions = []
        try:
            for prompt, future in zip(prompts, futures, strict=True):
                ids = future.result()
                stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
                answer = torch.tensor(ids[: min(stop, max_new_tokens)], dtype=prompt.dtype, device=prompt.device)
                completions.append(Completion(torch.cat([prompt, answer]), len(prompt)))
        finally:
            for future in futures:
                future.cancel()
        return completions

    # Kinds of servers --------------------------------------------------------------------------------------------

    def _vllm(
        self, client: JsonClient, body: dict[str, Any], prompt: list[int], ends: list[int], tokenizer: Any
    ) -> list[int]:
        # overrides the model's generation config, so that answers are sampled from the plain softmax
        sampling = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": ends}
        choice = _choice(client.post("completions", {**body, **sampling, "prompt": prompt, "return_token_ids": True}))
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
        choice = _choice(client.post("completions", {**body, "prompt": prompt_text(tokenizer, prompt)}))
        ids = tokenizer(choice.get("text") or "", add_special_tokens=False)["input_ids"]
        return _with_end(list(ids), choice, ends)

    def _reload(self, folder: Path) -> None:
        client = self._open()
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            client.retry(lambda: client.send("/collective_rpc", body))
            client.retry(lambda: client.send("/reset_prefix_cache", {}))
        except EndpointError as error:
            raise EndpointError(
                f"cannot load the student's weights: {error.what}",
                where=self.options.url,
                remedy="start vLLM, a version whose reload_weights takes weights_path, with VLLM_SERVER_DEV_MODE=1; "
                f"it must be able to read {folder}",
            ) from None

    # Weights -----------------------------------------------------------------------------------------------------

    def _write(self, state: dict[str, Any], folder: Path, ends: list[int], temperature: float) -> None:
        (template,) = self._template
        template.load_state_dict(state)
        model: Any = to_float_model(copy.deepcopy(template))
        if hasattr(model, "generation_config"):  # the default of servers, for what a request does not set
            from transformers import GenerationConfig

            sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
            model.generation_config = GenerationConfig(
                do_sample=temperature > 0, eos_token_id=ends or None, **sampling
            )
        with wrap_write_errors(folder), silence_transformers():
            model.save_pretrained(folder)
            if (tokenizer := getattr(model, "tokenizer", None)) is not None:
                tokenizer.save_pretrained(folder)

    def _step_folder(self, step: int) -> Path:
        if self._folder is None:
            parent = self.options.folder
            with wrap_write_errors(Path(parent or tempfile.gettempdir())):
                if parent is not None:
                    Path(parent).mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix="tutelage-rollouts-", dir=parent)).resolve()
                self._folder.chmod(0o755)  # the server may run as another user
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder / f"step-{step:09d}"

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
        if self.options.kind == "openai" and self.model is None:
            assert self._updated is not None
            return str(self._step_folder(self._updated))
        if self.model is None:
            client = self._open()
            models = client.retry(lambda: list_models(client.post))
            if not models:
                raise EndpointError(
                    "serves no model", where=self.options.url, remedy="start it with the student's model"
                )
            self.model = str(models[0]["id"])
        return self.model


def prompt_text(tokenizer: Any, ids: list[int]) -> str:
    """The text that a server with this tokenizer reads as these tokens, or the closest one.

    It omits the tokens that the tokenizer adds to the front of every text.
    """
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    prefix = list(tokenizer("")["input_ids"])
    for size in range(len(prefix), 0, -1):
        rest: str = tokenizer.decode(ids[size:], skip_special_tokens=False)
        if ids[:size] == prefix[:size] and list(tokenizer(rest)["input_ids"])[: len(ids)] == ids:
            return rest
    return text


def _choice(reply: Any) -> dict[str, Any]:
    """The only choice of a completion; raises :class:`TransientServerError` if there is none."""
    try:
        choice = reply["choices"][0]
        reason = choice["finish_reason"]
    except (LookupError, TypeError):
        raise TransientServerError(f"the reply has no choice: {shorten(reply)}", answered=True) from None
    if reason not in ("stop", "length"):
        raise TransientServerError(f"stops an answer early ({reason})", answered=True)
    return dict(choice)


def _with_end(ids: list[int], choice: dict[str, Any], ends: list[int]) -> list[int]:
    """An answer with its end token, which servers may omit."""
    if choice["finish_reason"] == "stop" and ends and not any(token in ends for token in ids):
        return [*ids, ends[0]]
    if not ids:
        raise TransientServerError("returns an empty answer", answered=True)
    return ids
