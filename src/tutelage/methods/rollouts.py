"""What a student writes, from a server that is given its weights every few steps."""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from tutelage.data.loader import current_rank
from tutelage.errors import CapabilityError, ConfigError, EndpointError
from tutelage.files import silence_transformers, wrap_write_errors
from tutelage.methods.sampling import Completion, ends_of
from tutelage.servers import JsonClient, TransientServerError, list_models
from tutelage.students import to_float_model

WHERE = "method.rollouts"


class Rollouts:
    """A server that writes in the student's place, with the student's weights of at most ``every`` steps ago.

    Weights are handed over in a folder, as a plain model of transformers (adapters merged), which the server must be
    able to read. The main process writes it and tells the server; each process asks for answers to its own prompts.

    Args:
        url: of the server, most often with ``/v1`` at its end.
        kind: ``vllm`` gets and gives token ids (``return_token_ids``) and reloads its weights from the folder
            (``reload_weights`` by ``/collective_rpc``, for which it is started with ``VLLM_SERVER_DEV_MODE=1``).
            ``openai``, any server with ``/v1/completions``, gets and gives text, which is cut into tokens again, and
            is asked for the folder by its path as the model's name, as ``transformers serve`` takes it.
        model: the name to ask for. Default: of ``vllm`` the first that it serves; of ``openai`` the folder.
        every: steps after which the weights are handed over again; ``None``: never. The server then writes as
            whatever it serves, and not as the student.
        folder: where weights are written. Default: a temporary folder of this machine.
        key_env: name of the environment variable that holds the key.
        concurrency: most requests at once.
        timeout: seconds for an answer, and for new weights.
        max_retry_time: seconds without an answer after which the server is given up.

    Raises:
        ConfigError: a server of OpenAI's protocol that is given no weights, and no name of a model.
    """

    def __init__(
        self,
        url: str,
        kind: Literal["vllm", "openai"] = "vllm",
        model: str | None = None,
        every: int | None = 10,
        folder: str | None = None,
        key_env: str | None = None,
        concurrency: int = 16,
        timeout: float = 300.0,
        max_retry_time: float = 200.0,
    ) -> None:
        if kind == "openai" and (every is None) != (model is not None):
            raise ConfigError(
                f"kind='openai' with model={model!r}, every={every}",
                where=WHERE,
                remedy="such a server has new weights under the name of their folder: leave model out, or set "
                "every: null and name the model that is to write",
            )
        self.url, self.kind, self.model, self.every, self.folder = url, kind, model, every, folder
        self._open = partial(
            JsonClient,
            url,
            WHERE,
            key_env=key_env,
            concurrency=concurrency,
            timeout=timeout,
            max_retry_time=max_retry_time,
        )
        self._server: JsonClient | None = None
        self._top: Path | None = None
        self._handed: int | None = None
        self._mold: tuple[nn.Module, ...] = ()

    def shape(self, student: nn.Module) -> None:
        """Keep a copy of the student, for the names and kinds of its weights; on the main process."""
        if self.every is not None and current_rank().rank == 0:
            self._mold = (copy.deepcopy(student).cpu(),)

    def take(self, student: nn.Module, step: int, sampling: float) -> None:
        """Hand the student's weights over, where they are due.

        Args:
            student: as it is trained; all processes call this where they share its parts.
            step: optimizer steps done.
            sampling: temperature at which the server is to write.

        Raises:
            EndpointError: the server does not take them.
        """
        if self.every is None or (self._handed is not None and step - self._handed < self.every):
            return
        state = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        before, self._handed = self._handed, step
        if current_rank().rank == 0:
            self._write(state, self._place(step), ends_of(student), sampling)
            if self.kind == "vllm":
                self._reload(self._place(step))
            if before is not None:
                shutil.rmtree(self._place(before), ignore_errors=True)
        if current_rank().world > 1:
            top = [None if self._top is None else str(self._top)]
            dist.broadcast_object_list(top)
            self._top = Path(str(top[0]))

    def check(self, student: nn.Module, prompt: Tensor, sampling: float) -> None:
        """Hand the weights over and have a token written; raises as both do."""
        self.take(student, 0, sampling)
        self.sample_completions(student, [prompt], max_new_tokens=1, temperature=sampling)

    def sample_completions(
        self, student: nn.Module, prompts: Sequence[Tensor], *, max_new_tokens: int, temperature: float
    ) -> list[Completion]:
        """A completion of each prompt, as :func:`tutelage.methods.sampling.sample_completions` gives it.

        Args:
            student: whose tokens are meant.
            prompts: token ids, none of them empty.
            max_new_tokens: most tokens of an answer.
            temperature: of the softmax that is drawn from; 0 takes the likeliest token.

        Raises:
            EndpointError: the server fails, for longer than its patience.
            CapabilityError: it would have to be asked in text, and the student has no tokenizer.
        """
        ends, ask = ends_of(student), self._vllm if self.kind == "vllm" else self._openai
        tokenizer: Any = getattr(student, "tokenizer", None)
        if self.kind == "openai" and tokenizer is None:
            raise CapabilityError(
                f"{type(student).__name__} has no tokenizer, and the server reads text",
                where=f"{WHERE}.kind",
                remedy="load the student with its tokenizer, or use vLLM, which reads token ids",
            )
        server, name = self._opened(), self._name()
        body = {"model": name, "max_tokens": max_new_tokens, "temperature": temperature, "top_p": 1.0}
        asked = [server.submit(partial(ask, server, body, p.tolist(), ends, tokenizer)) for p in prompts]
        found = []
        try:
            for prompt, answer in zip(prompts, asked, strict=True):
                ids = answer.result()
                stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
                said = torch.tensor(ids[: min(stop, max_new_tokens)], dtype=prompt.dtype, device=prompt.device)
                found.append(Completion(torch.cat([prompt, said]), len(prompt)))
        finally:
            for answer in asked:
                answer.cancel()
        return found

    # Kinds of servers --------------------------------------------------------------------------------------------

    def _vllm(
        self, server: JsonClient, body: dict[str, Any], prompt: list[int], ends: list[int], tokenizer: Any
    ) -> list[int]:
        # what the model's own generation config would set is said, so that answers are drawn from the softmax
        own = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": ends}
        choice = _choice(server.post("completions", {**body, **own, "prompt": prompt, "return_token_ids": True}))
        ids = choice.get("token_ids")
        if ids is None:
            raise EndpointError(
                "gives no token ids of what it wrote", where=WHERE,
                remedy="use vLLM 0.10.2 or newer, or kind: openai for a server that gives text alone",
            )  # fmt: skip
        return _whole([int(x) for x in ids], choice, ends)

    def _openai(
        self, server: JsonClient, body: dict[str, Any], prompt: list[int], ends: list[int], tokenizer: Any
    ) -> list[int]:
        choice = _choice(server.post("completions", {**body, "prompt": read_as(tokenizer, prompt)}))
        ids = tokenizer(choice.get("text") or "", add_special_tokens=False)["input_ids"]
        return _whole(list(ids), choice, ends)

    def _reload(self, folder: Path) -> None:
        server = self._opened()
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            server.retry(lambda: server.send("/collective_rpc", body))
            server.retry(lambda: server.send("/reset_prefix_cache", {}))
        except EndpointError as error:
            raise EndpointError(
                f"does not take the student's weights: {error.what}",
                where=self.url,
                remedy="start vLLM, a version whose reload_weights takes weights_path, with VLLM_SERVER_DEV_MODE=1; "
                f"it must be able to read {folder}",
            ) from None

    # Weights -----------------------------------------------------------------------------------------------------

    def _write(self, state: dict[str, Any], folder: Path, ends: list[int], sampling: float) -> None:
        (mold,) = self._mold
        mold.load_state_dict(state)
        model: Any = to_float_model(copy.deepcopy(mold))
        if hasattr(model, "generation_config"):  # servers draw as it says, where a request does not
            from transformers import GenerationConfig

            drawn = {"temperature": sampling, "top_k": 0, "top_p": 1.0} if sampling else {}
            model.generation_config = GenerationConfig(do_sample=sampling > 0, eos_token_id=ends or None, **drawn)
        with wrap_write_errors(folder), silence_transformers():
            model.save_pretrained(folder)
            if (tokenizer := getattr(model, "tokenizer", None)) is not None:
                tokenizer.save_pretrained(folder)

    def _place(self, step: int) -> Path:
        if self._top is None:
            with wrap_write_errors(Path(self.folder or tempfile.gettempdir())):
                if self.folder is not None:
                    Path(self.folder).mkdir(parents=True, exist_ok=True)
                self._top = Path(tempfile.mkdtemp(prefix="tutelage-rollouts-", dir=self.folder)).resolve()
                self._top.chmod(0o755)  # the server may be somebody else's
            weakref.finalize(self, shutil.rmtree, self._top, ignore_errors=True)
        return self._top / f"step-{step:09d}"

    def _opened(self) -> JsonClient:
        if self._server is None:
            self._server = self._open()
            weakref.finalize(self, self._server.close)
        return self._server

    def _name(self) -> str:
        if self.kind == "openai" and self.model is None:
            assert self._handed is not None
            return str(self._place(self._handed))
        if self.model is None:
            server = self._opened()
            there = server.retry(lambda: list_models(server.post))
            if not there:
                raise EndpointError("serves no model", where=self.url, remedy="start it with the student's")
            self.model = str(there[0]["id"])
        return self.model


def read_as(tokenizer: Any, ids: list[int]) -> str:
    """The text that a server with this tokenizer reads as these tokens, or as near to them as any.

    What the tokenizer puts before every text by itself is left out.
    """
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    added = list(tokenizer("")["input_ids"])
    for size in range(len(added), 0, -1):
        rest: str = tokenizer.decode(ids[size:], skip_special_tokens=False)
        if ids[:size] == added[:size] and list(tokenizer(rest)["input_ids"])[: len(ids)] == ids:
            return rest
    return text


def _choice(reply: Any) -> dict[str, Any]:
    """The one answer of a completion.

    Raises:
        Fault: there is none.
    """
    try:
        choice = reply["choices"][0]
        reason = choice["finish_reason"]
    except (LookupError, TypeError):
        raise TransientServerError(f"answers without a choice: {str(reply)[:200]}", answered=True) from None
    if reason not in ("stop", "length"):
        raise TransientServerError(f"breaks an answer off ({reason})", answered=True)
    return dict(choice)


def _whole(ids: list[int], choice: dict[str, Any], ends: list[int]) -> list[int]:
    """An answer with the end that it came to, which servers may leave out."""
    if choice["finish_reason"] == "stop" and ends and not any(token in ends for token in ids):
        return [*ids, ends[0]]
    if not ids:
        raise TransientServerError("writes nothing", answered=True)
    return ids
