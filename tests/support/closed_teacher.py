"""A server that speaks chat completions, injects faults, and keeps books of its own, against which tests check.

Not a model: what it says is a function of what it is asked, so that two runs are given the same answers. With
``upstream`` it is a proxy before a real server, and injects the same faults.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

FAULTS = (
    "429", "500", "502", "time-out", "reset", "drip", "truncated", "not json", "no choices", "content filter",
)  # fmt: skip
"""Everything that can go wrong with a call."""

BILLED = {"good", "time-out", "reset", "drip", "truncated", "not json", "no choices", "content filter"}
"""Calls that took the model's time."""


@dataclass
class Call:
    """A line of the books."""

    prompt: str
    kind: str
    tokens_in: int
    tokens_out: int
    flying: int
    key: str | None
    sent: bool = False


def said(prompt: str) -> str:
    """What the model says: words drawn by the prompt."""
    dice, words = random.Random(prompt), WORDS.split()
    return " ".join(dice.choice(words) for _ in range(dice.randint(8, 30)))


WORDS = (
    "river stone window letter garden copper winter market bridge silver orange candle forest engine pepper marble "
    "button harbour thunder velvet meadow lantern pocket ribbon saddle ticket uncle violin walnut yellow anchor"
)


@dataclass
class Closed:
    """The server, in a thread of its own.

    Args:
        rate: share of calls that go wrong.
        faults: in which ways.
        delay: seconds that an answer takes.
        model: the only one that it serves.
        key: what it wants to be shown.
        answer: what it says.
        after: what Retry-After holds.
        echo: repeat the caller's Authorization in whatever it says.
        status: answer every call with it.
        slow: seconds that a time-out and a drip take.
        room: calls at a time, above which it says 429.
        upstream: a real server, whose answers are passed on.
        seed: of the faults.
    """

    rate: float = 0.0
    faults: Sequence[str] = FAULTS
    delay: float = 0.002
    model: str = "closed"
    key: str | None = None
    answer: Callable[[str], str] = said
    after: str = "0.05"
    echo: bool = False
    status: int | None = None
    slow: float = 3.0
    room: int | None = None
    upstream: str | None = None
    calls: list[Call] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    flying: int = 0
    seed: int = 0

    def __enter__(self) -> Closed:
        self._dice = random.Random(self.seed)
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.looks: Counter[str] = Counter()

        def serve() -> None:
            asyncio.set_event_loop(self._loop)
            self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
            self.port = self._server.sockets[0].getsockname()[1]
            ready.set()
            self._loop.run_forever()
            self._server.close()
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()

        self._thread = threading.Thread(target=serve)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *args: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def billed(self) -> tuple[int, int]:
        """Tokens in and out of all calls that took the model's time."""
        taken = [c for c in self.calls if c.kind in BILLED]
        return sum(c.tokens_in for c in taken), sum(c.tokens_out for c in taken)

    def of(self, prompt: str) -> list[Call]:
        """The calls with a prompt."""
        return [c for c in self.calls if c.prompt == prompt]

    # HTTP ----------------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                first, *lines = head.decode().split("\r\n")
                method, path, _ = first.split(" ")
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.flying += 1
                try:
                    if not await self._reply(method, path, headers, body, writer):
                        return
                finally:
                    self.flying -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _reply(
        self, method: str, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        given = headers.get("authorization")
        echo = f" {given}" if self.echo else ""

        def out(status: int, content: Any, extra: str = "") -> None:
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            head = f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n{extra}"
            writer.write(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + raw)

        def error(status: int, message: str, code: str = "", extra: str = "") -> bool:
            out(status, {"error": {"message": message + echo, "code": code}}, extra)
            return True

        if self.key is not None and given != f"Bearer {self.key}":
            return error(401, "Incorrect API key provided:")
        if path == "/v1/models":
            out(200, {"data": [{"id": self.model}]})
            return True
        if path.startswith(("/v1/files", "/v1/batches")):
            return self._batch(method, path, body, out)
        if path != "/v1/chat/completions":
            return error(404, "no such page")
        asked = json.loads(body)
        prompt = asked["messages"][-1]["content"]
        kind = self._dice.choice(self.faults) if self._dice.random() < self.rate else "good"
        text = self.answer(prompt)
        tokens_in = sum(len(m["content"].split()) for m in asked["messages"])
        tokens_out = min(len(text.split()), asked["max_tokens"])
        call = Call(prompt, kind, tokens_in, tokens_out, self.flying, given)
        self.times.append(self._loop.time())
        if asked["model"] != self.model:
            return error(404, f"The model {asked['model']} does not exist", "model_not_found")
        self.calls.append(call)
        if self.status is not None or (self.room is not None and self.flying > self.room):
            call.kind = str(self.status or 429)
            return error(self.status or 429, "so it is")
        await asyncio.sleep(self.delay)
        if self.upstream is None or kind not in BILLED:
            reply = self.completion(asked)
        else:
            reply = await asyncio.to_thread(self._passed_on, body)
            call.tokens_in, call.tokens_out = reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]
        good = json.dumps(reply, indent=1 if len(self.calls) % 2 else None).encode()
        if self.echo:
            good = good.replace(b'"content": "', b'"content": "' + str(given).encode())
        match kind:
            case "429":
                return error(429, "slow down", extra=f"retry-after: {self.after}\r\n")
            case "500" | "502":
                return error(int(kind), "oh no")
            case "time-out":
                await asyncio.sleep(self.slow)
                return False
            case "reset":
                writer.transport.abort()
                return False
            case "drip":
                writer.write(f"HTTP/1.1 200 X\r\ncontent-length: {len(good)}\r\n\r\n".encode())
                for i in range(round(self.slow / 0.05)):
                    writer.write(good[i : i + 1])
                    await writer.drain()
                    await asyncio.sleep(0.05)
                return False
            case "truncated":
                writer.write(
                    f"HTTP/1.1 200 X\r\ncontent-length: {len(good)}\r\n\r\n".encode() + good[: len(good) // 2]
                )
                await writer.drain()
                return False
            case "not json":
                out(200, good[: len(good) // 2])
            case "no choices":
                out(200, {**json.loads(good), "choices": []})
            case "content filter":
                reply["choices"][0] |= {"finish_reason": "content_filter", "message": {"content": None}}
                out(200, reply)
            case _:
                out(200, good)
        await writer.drain()
        call.sent = True
        return True

    def _passed_on(self, body: bytes) -> dict[str, Any]:
        """What the real server says."""
        ask = urllib.request.Request(f"{self.upstream}/chat/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(ask, timeout=300) as found:
            return json.loads(found.read())

    def completion(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What a good call gives."""
        prompt = asked["messages"][-1]["content"]
        words = self.answer(prompt).split(" ")
        cut = len(words) > asked["max_tokens"]
        text = " ".join(words[: asked["max_tokens"]])
        usage = {
            "prompt_tokens": sum(len(m["content"].split()) for m in asked["messages"]),
            "completion_tokens": min(len(self.answer(prompt).split()), asked["max_tokens"]),
        }
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "length" if cut else "stop",
        }
        return {"object": "chat.completion", "model": self.model, "choices": [choice], "usage": usage}

    # Batches -------------------------------------------------------------------------------------------------

    def _batch(self, method: str, path: str, body: bytes, out: Callable[..., None]) -> bool:
        name = path.removeprefix("/v1/").partition("?")[0]
        if name == "files":
            content = body.split(b"application/jsonl\r\n\r\n", 1)[1].rsplit(b"\r\n--", 1)[0]
            file = f"file-{hashlib.sha256(content).hexdigest()[:8]}-{len(self.files)}"
            self.files[file] = content
            out(200, {"id": file})
        elif name.startswith("files/"):
            out(200, self.files[name.split("/")[1]])
        elif name == "batches" and method == "POST":
            batch = f"batch-{len(self.batches)}"
            self.batches[batch] = {
                "id": batch,
                "input_file_id": json.loads(body)["input_file_id"],
                "status": "in_progress",
            }
            out(200, self.batches[batch])
        elif name == "batches":
            out(200, {"data": list(self.batches.values())})
        else:
            batch = name.split("/")[1]
            self.looks[batch] += 1
            if self.looks[batch] == 3:
                self._work(self.batches[batch])
            out(200, self.batches[batch])
        return True

    def _work(self, batch: dict[str, Any]) -> None:
        good, bad = [], []
        for line in self.files[batch["input_file_id"]].splitlines():
            asked = json.loads(line)
            body = asked["body"]
            prompt = body["messages"][-1]["content"]
            reply = self.completion(body)
            usage = reply["usage"]
            fails = self._dice.random() < self.rate
            kind = "500" if fails else "good"
            self.calls.append(Call(prompt, kind, usage["prompt_tokens"], usage["completion_tokens"], 1, None, True))
            result = {"custom_id": asked["custom_id"], "error": None}
            if fails:
                bad.append({**result, "response": {"status_code": 500, "body": {"error": {"message": "oh no"}}}})
            else:
                good.append({**result, "response": {"status_code": 200, "body": reply}})
        for part, lines in (("output_file_id", good), ("error_file_id", bad)):
            if lines:
                file = f"file-{batch['id']}-{part}"
                self.files[file] = b"\n".join(json.dumps(line).encode() for line in lines) + b"\n"
                batch[part] = file
        batch["status"] = "completed"
