"""Servers in this process that answer as vLLM and llama.cpp document it, from a real model, with faults."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

Fault = Callable[["Handler", Any], Any]
"""What becomes of an answer; ``None`` where the fault has answered itself."""


class Server(ThreadingHTTPServer):
    """``faults`` strike the scoring requests from the first on, one each."""

    daemon_threads = True

    def __init__(self, model: Any, tokenizer: Any, most: int = 20, longest: int = 256) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer, self.most, self.longest = model.eval(), tokenizer, most, longest
        self.faults: list[Fault | None] = []
        self.asked: list[Any] = []
        self.told: list[tuple[str, Any]] = []
        self.takes = True
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that was cut on purpose."""

    @torch.no_grad()
    def log_probs(self, ids: list[int]) -> torch.Tensor:
        with self.lock:
            return self.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


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
        size = len(self.server.tokenizer)
        pages = {
            "/v1/models": {"object": "list", "data": [{
                "id": "tiny", "object": "model", "max_model_len": self.server.longest, "meta": {"n_vocab": size},
            }]},
            "/props": {"default_generation_settings": {"n_ctx": self.server.longest}, "total_slots": 1},
        }  # fmt: skip
        found = pages.get(self.path)
        self.reply(404 if found is None else 200, found or {"error": {"message": "not found"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path in ("/collective_rpc", "/reset_prefix_cache"):
            with self.server.lock:
                self.server.told.append((self.path, body))
            if not self.server.takes:
                self.reply(404, {"error": {"message": "not found"}})
                return
            self.reload(body) if self.path == "/collective_rpc" else self.reply(200, None)
            return
        if self.path == "/tokenize":
            text = body.get("prompt", body.get("content"))
            self.reply(200, {"tokens": self.server.tokenizer(text, add_special_tokens=False)["input_ids"]})
            return
        with self.server.lock:
            self.server.asked.append(body)
            self.server.headers.append(dict(self.headers))
            fault = self.server.faults.pop(0) if self.server.faults else None
        answer = {"/v1/completions": self.vllm, "/completion": self.llama_cpp}[self.path](body)
        if answer is not None and fault is not None:
            answer = fault(self, answer)
        if answer is not None:
            self.reply(200, answer)

    def reload(self, body: Any) -> None:
        """`collective_rpc` of vLLM's development mode, of the one method that is called here."""
        from transformers import AutoModelForCausalLM

        assert body["method"] == "reload_weights"
        with self.server.lock:
            self.server.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
        self.reply(200, {"results": [None]})

    def written(self, body: Any) -> Any:
        """A completion of token ids, its end among them, drawn as vLLM does where a request says all of it."""
        assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, -1, 0.0, 1.0)
        ids, warm = torch.tensor([body["prompt"]]), body["temperature"] > 0
        drawing = (
            {"do_sample": True, "temperature": body["temperature"], "top_k": 0} if warm else {"do_sample": False}
        )
        with self.server.lock, torch.no_grad():
            said = self.server.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=body["max_tokens"],
                eos_token_id=body["stop_token_ids"] or None, pad_token_id=0, **drawing,
            )[0, ids.shape[1] :].tolist()  # fmt: skip
        ended = said[-1] in body["stop_token_ids"]
        choice = {"index": 0, "text": "?", "finish_reason": "stop" if ended else "length"}
        return {"id": "cmpl-2", "object": "text_completion", "model": body["model"], "choices": [
            {**choice, **({"token_ids": said} if body.get("return_token_ids") else {})},
        ]}  # fmt: skip

    def vllm(self, body: Any) -> Any:
        if "prompt_logprobs" not in body:
            return self.written(body)
        k = body["prompt_logprobs"]
        if k > self.server.most:
            message = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.server.most}"
            self.reply(400, {"error": {"message": message, "type": "BadRequestError", "code": 400}})
            return None
        ids = body["prompt"]
        assert all(isinstance(x, int) for x in ids)
        rows: list[Any] = [None]
        for log, token in zip(self.server.log_probs(ids), ids[1:], strict=False):
            best = log.topk(k)
            there = [int(x) for x in best.indices]
            rank = int((log > log[token]).sum()) + 1
            entry = {} if token in there else {str(token): {"logprob": float(log[token]), "rank": rank}}
            for i, x in enumerate(there):
                entry[str(x)] = {"logprob": float(log[x]), "rank": i + 1, "decoded_token": "?"}
            rows.append(entry)
        return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [
            {"index": 0, "text": "x", "finish_reason": "length", "logprobs": None, "prompt_logprobs": rows},
        ]}  # fmt: skip

    def llama_cpp(self, body: Any) -> Any:
        assert body["n_predict"] == 1
        assert not body["post_sampling_probs"]
        answers = []
        for i, ids in enumerate(body["prompt"]):
            best = self.server.log_probs(ids)[-1].topk(min(body["n_probs"], len(self.server.tokenizer)))
            top = [{"id": int(x), "token": "?", "bytes": [63], "logprob": float(v)}
                   for v, x in zip(best.values, best.indices, strict=True)]  # fmt: skip
            # of a token that ends the text, or is a part of a character, the real one says nothing
            said = [{**top[0], "top_logprobs": top}] if body.get("logit_bias") else []
            answers.append({"index": i, "tokens_evaluated": len(ids), "truncated": False,
                            "completion_probabilities": said})  # fmt: skip
        return answers[::-1]


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
    return answer[1:]


def nothing_of_a_token(_: Handler, answer: Any) -> Any:
    answer[0]["completion_probabilities"] = []
    return answer
