"""Servers in this process that answer as vLLM 0.32 and llama.cpp are seen to, from a real model, with faults."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

Fault = Callable[["Handler", Any], Any]
"""What becomes of an answer; ``None`` where the fault has answered itself."""


NEUTRAL = {
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "top_k": 0, "top_p": 1.0,
    "min_p": 0.0,
}  # fmt: skip
"""What vLLM 0.32 takes from the generation_config.json of its model where a request does not set it."""


class Server(ThreadingHTTPServer):
    """``faults`` strike the scoring requests from the first on, one each.

    ``kind`` is ``vllm``, as vLLM 0.32 for CPUs answers, or ``llama.cpp``. Of vLLM: weights are loaded into the model
    that it has; one that is tied has an output head of its own, which changes only with the head's own weights; it
    does not survive weights of another shape. With ``ignores`` a hand-over changes nothing.
    """

    daemon_threads = True

    def __init__(self, model: Any, tokenizer: Any, kind: str = "vllm", most: int = 20, longest: int = 256) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.kind, self.tokenizer, self.most, self.longest = kind, tokenizer, most, longest
        self.first = model
        self.restart()
        self.faults: list[Fault | None] = []
        self.asked: list[Any] = []
        self.told: list[tuple[str, Any]] = []
        self.takes, self.ignores, self.scale = True, False, 1.0
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()

    def restart(self) -> None:
        """The model that it was started with."""
        self.model, self.is_dead = copy.deepcopy(self.first).eval(), False
        head = self.model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that was cut on purpose."""

    @torch.no_grad()
    def log_probs(self, ids: list[int]) -> torch.Tensor:
        with self.lock:
            logits: torch.Tensor = self.model(input_ids=torch.tensor([ids])).logits[0].float()
            return logits.log_softmax(-1) if self.scale == 1.0 else logits * self.scale


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def reply(self, status: int, body: Any, **headers: str) -> None:
        raw = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(raw)), "content-type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        server, is_vllm = self.server, self.server.kind == "vllm"
        listed = {"id": "tiny", "object": "model", "owned_by": "vllm" if is_vllm else "llamacpp"}
        listed |= {"max_model_len": server.longest} if is_vllm else {"meta": {"n_vocab": len(server.tokenizer)}}
        models = {"object": "list", "data": [listed]}
        pages: dict[str, Any] = {"/v1/models": models}
        if not is_vllm:
            props = {"default_generation_settings": {"n_ctx": server.longest}, "total_slots": 1}
            pages |= {"/models": models, "/props": props}
        found = pages.get(self.path)
        self.reply(200, found) if found is not None else self.nothing_here()

    def nothing_here(self) -> None:
        message = {"message": "File Not Found", "type": "not_found_error", "code": 404}
        self.reply(404, {"detail": "Not Found"} if self.server.kind == "vllm" else {"error": message})

    def refuse(self, status: int, message: str) -> None:
        self.reply(status, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server, is_vllm = self.server, self.server.kind == "vllm"
        if is_vllm and self.path in ("/collective_rpc", "/reset_prefix_cache"):
            self.develop(body)
            return
        if self.path == "/tokenize":
            self.tokenize(body)
            return
        if self.path not in (["/v1/completions"] if is_vllm else ["/v1/completions", "/completions", "/completion"]):
            self.nothing_here()
            return
        with server.lock:
            server.asked.append(body)
            server.headers.append(dict(self.headers))
            fault = server.faults.pop(0) if server.faults else None
        if server.is_dead:
            self.refuse(500, "EngineCore encountered an issue. See stack trace (above) for the root cause.")
            return
        answer = self.vllm(body) if is_vllm else self.llama_cpp(body)
        if answer is not None and fault is not None:
            answer = fault(self, answer)
        if answer is not None:
            self.reply(200, answer)

    def tokenize(self, body: Any) -> None:
        if self.server.kind == "llama.cpp":  # without a content: of nothing
            text = body.get("content", "")
        elif "prompt" not in body:
            self.refuse(
                400, "2 validation errors: {'type': 'missing', 'loc': 'body.prompt', 'msg': 'Field required'}"
            )
            return
        elif body.get("model", "tiny") != "tiny":
            self.refuse(404, f"The model `{body['model']}` does not exist. Valid aliases: tiny.")
            return
        else:
            text = body["prompt"]
        special = (
            body.get("add_special_tokens", True) if self.server.kind == "vllm" else body.get("add_special", False)
        )
        self.reply(200, {"tokens": self.server.tokenizer(text, add_special_tokens=special)["input_ids"]})

    def develop(self, body: Any) -> None:
        """vLLM's development mode, as far as it is used here."""
        if not self.server.takes:
            self.nothing_here()
        elif body.get("method") == "get_model_inspection":
            self.reply(200, {"results": [self.inspection()]})
        else:
            with self.server.lock:
                self.server.told.append((self.path, body))
            self.reload(body) if self.path == "/collective_rpc" else self.reply(200, {"success": True})

    def inspection(self) -> str:
        """As vLLM 0.32 prints its model, cut to what counts."""
        config = self.server.model.config
        size = f"num_embeddings={config.vocab_size}, num_embeddings_per_partition=384"
        layers = "(0)" if config.num_hidden_layers == 1 else f"(0-{config.num_hidden_layers - 1})"
        return (
            f"LlamaForCausalLM()(\n  (model): LlamaModel()(\n"
            f"    (embed_tokens): VocabParallelEmbedding({size}, embedding_dim={config.hidden_size}, tp_size=1)\n"
            f"    (layers): ModuleList()(\n      {layers}: {config.num_hidden_layers} x LlamaDecoderLayer()(\n"
            f"        (self_attn): LlamaAttention()(\n          (attn): Attention(head_size=32)\n        )\n      )\n"
            f"    )\n    (norm): RMSNorm(hidden_size={config.hidden_size}, eps=1e-06)\n  )\n)"
        )

    def reload(self, body: Any) -> None:
        """Load the weights of a folder into the model."""
        from safetensors.torch import load_file

        assert body["method"] == "reload_weights"
        own = self.server.model.state_dict()
        given = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
        wrong = [name for name, weight in given.items() if name not in own or own[name].shape != weight.shape]
        if wrong:
            self.server.is_dead = True
            self.refuse(500, f"Call to collective_rpc method failed: Worker failed with error '{wrong[0]}'")
            return
        if not self.server.ignores:
            with self.server.lock:
                self.server.model.load_state_dict(given, strict=False)
        self.reply(200, {"results": [None]})

    def written(self, body: Any) -> Any:
        """A completion of token ids, its end among them, drawn from the softmax."""
        from transformers import GenerationConfig

        folder = self.server.model.generation_config.to_dict()
        default = {name: value if folder.get(name) is None else folder[name] for name, value in NEUTRAL.items()}
        sampling = {name: body.get(name, default[name]) for name in NEUTRAL}
        assert {**sampling, "top_k": max(sampling["top_k"], 0)} == NEUTRAL  # the double knows nothing else
        ends = list(body["stop_token_ids"])
        if not body.get("ignore_eos"):
            own = folder.get("eos_token_id")
            ends += own if isinstance(own, list) else [] if own is None else [own]
        ids, warm = torch.tensor([body["prompt"]]), body["temperature"] > 0
        drawing: dict[str, Any] = {"do_sample": True, "temperature": body["temperature"], "top_k": 0} if warm else {}
        plain = GenerationConfig(
            pad_token_id=0, eos_token_id=ends or None, **drawing,
            max_new_tokens=min(body["max_tokens"], self.server.longest - ids.shape[1]),
        )  # fmt: skip
        with self.server.lock, torch.no_grad():
            self.server.model.generation_config = GenerationConfig()
            said = self.server.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=plain
            )[0, ids.shape[1] :].tolist()
            self.server.model.generation_config = GenerationConfig(**folder)
        choice = {"index": 0, "text": "?", "finish_reason": "stop" if said[-1] in ends else "length"}
        return {"id": "cmpl-2", "object": "text_completion", "model": "tiny", "choices": [
            {**choice, "token_ids": said if body.get("return_token_ids") else None, "prompt_logprobs": None},
        ], "usage": {"prompt_tokens": ids.shape[1], "completion_tokens": len(said)}}  # fmt: skip

    def vllm(self, body: Any) -> Any:
        ids, server = body["prompt"], self.server
        assert all(isinstance(x, int) for x in ids)
        if body.get("model", "tiny") != "tiny":
            return self.refuse(404, f"The model `{body['model']}` does not exist. Valid aliases: tiny.")
        if max(ids) >= server.model.config.vocab_size:
            return self.refuse(400, f"Token id {max(ids)} is out of vocabulary")
        if len(ids) >= server.longest:
            return self.refuse(400, f"max_tokens must be at least 1, got {server.longest - len(ids)}.")
        if "prompt_logprobs" not in body:
            return self.written(body)
        k = body["prompt_logprobs"]
        if k > server.most:
            return self.refuse(
                400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {server.most}"
            )
        rows: list[Any] = [None]
        for log, token in zip(server.log_probs(ids), ids[1:], strict=False):
            best = log.topk(k)
            there = [int(x) for x in best.indices]
            rank = int((log > log[token]).sum()) + 1
            entry = {} if token in there else {str(token): {"logprob": float(log[token]), "rank": rank}}
            for i, x in enumerate(there):
                entry[str(x)] = {"logprob": float(log[x]), "rank": i + 1, "decoded_token": "?"}
            rows.append(entry)
        return {"id": "cmpl-1", "object": "text_completion", "model": "tiny", "choices": [
            {"index": 0, "text": "x", "finish_reason": "length", "logprobs": None, "prompt_logprobs": rows},
        ], "usage": {"prompt_tokens": len(ids), "completion_tokens": 1}}  # fmt: skip

    def llama_cpp(self, body: Any) -> Any:
        if "n_predict" not in body:  # OpenAI's protocol, without log-probabilities of a prompt
            choice = {"text": "?", "index": 0, "logprobs": None, "finish_reason": "length"}
            return {"object": "text_completion", "model": "tiny", "choices": [choice]}
        assert body["n_predict"] == 1
        assert not body["post_sampling_probs"]
        answers = []
        for i, ids in enumerate(body["prompt"]):
            if len(ids) >= self.server.longest:
                return self.refuse(400, f"request ({len(ids)} tokens) exceeds the available context size")
            best = self.server.log_probs(ids)[-1].topk(min(body["n_probs"], len(self.server.tokenizer)))
            top = [{"id": int(x), "token": "?", "bytes": [63], "logprob": float(v)}
                   for v, x in zip(best.values, best.indices, strict=True)]  # fmt: skip
            # of a token that ends the text, or is a part of a character, the real one says nothing
            said = [{**top[0], "top_logprobs": top}] if body.get("logit_bias") else []
            answers.append({"index": i, "tokens_evaluated": len(ids), "truncated": False,
                            "completion_probabilities": said})  # fmt: skip
        return answers[::-1] if len(answers) > 1 else answers[0]


@contextmanager
def serving(model: Any, tokenizer: Any, **options: Any) -> Iterator[Server]:
    """A server on a port of its own."""
    server = Server(model, tokenizer, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# Faults ------------------------------------------------------------------------------------------------


def dies(handler: Handler, _: Any) -> None:
    handler.close_connection = True
    handler.connection.close()


def dies_halfway(handler: Handler, _: Any) -> None:
    handler.send_response(200)
    handler.send_header("content-length", "100000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"index": 0, "prompt_logpr')
    handler.wfile.flush()
    handler.close_connection = True


def overloaded(handler: Handler, _: Any) -> None:
    handler.reply(429, {"error": {"message": "slow down"}}, retry_after="0.01")


def breaks(handler: Handler, _: Any) -> None:
    handler.reply(500, {"error": {"message": "out of memory"}})


def _rows(answer: Any) -> Any:
    return answer["choices"][0]["prompt_logprobs"]


def fewer_tokens(_: Handler, answer: Any) -> Any:
    del _rows(answer)[-1]
    return answer


def fewer_of_a_token(_: Handler, answer: Any) -> Any:
    entry = _rows(answer)[-1]
    for token in list(entry)[2:]:
        del entry[token]
    return answer


def infinite(_: Handler, answer: Any) -> Any:
    for token in list(_rows(answer)[-1])[-3:]:
        _rows(answer)[-1][token]["logprob"] = float("-inf")
    return answer


def out_of_order(_: Handler, answer: Any) -> Any:
    rows = _rows(answer)
    rows[1:] = rows[:0:-1]
    return answer


def in_another_order(_: Handler, answer: Any) -> Any:
    """The same, said otherwise; no fault."""
    rows = _rows(answer)
    rows[1:] = [dict(reversed(entry.items())) for entry in rows[1:]]
    other = {"index": 1, "prompt_logprobs": [None]}
    return {**answer, "choices": [other, *answer["choices"]]}


def fewer_prompts(_: Handler, answer: Any) -> Any:
    return answer[1:] if isinstance(answer, list) else []


def nothing_of_a_token(_: Handler, answer: Any) -> Any:
    (answer[0] if isinstance(answer, list) else answer)["completion_probabilities"] = []
    return answer
