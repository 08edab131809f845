"""The provider's batch API: requests are uploaded as a file, and their answers fetched later, at half the price.

The journal records a batch as soon as its file is uploaded. If the process dies before it gets the batch's id, the
next process finds the batch by the id of this file. So no batch is paid for twice.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tutelage.errors import EndpointError
from tutelage.generation.client import FIRST_WAIT, LONGEST_WAIT
from tutelage.generation.requests import CallError, FatalResponse, ValidResponse, canonical_json, parse_response
from tutelage.generation.scheduler import PendingRequest, RequestClient

MAX_REQUESTS = 50_000
MAX_BYTES = 90_000_000
"""Limits of one file."""

RUNNING = ("validating", "in_progress", "finalizing", "cancelling")


class BatchClient(RequestClient):
    """Sends chat completions to one server through its batch API."""

    async def fetch(self, pending: Sequence[PendingRequest]) -> None:
        """Run batches until each request has an outcome or the scheduler is over; open batches then continue."""
        waiting = {one.request.key: one for one in pending}
        for name, batch in list(self.scheduler.journal.batches.items()):
            if batch["state"] != "done" and self.endpoint.model == batch["model"]:
                await self._complete(name, waiting)
        while waiting and not self.scheduler.is_over:
            uploaded = await self._upload(list(waiting.values()))
            if uploaded is not None:
                await self._complete(uploaded, waiting)

    async def _upload(self, pending: Sequence[PendingRequest]) -> str | None:
        """Upload as many requests as the budget and the limits of a file allow; returns the name of their batch."""
        lines: list[bytes] = []
        keys: list[str] = []
        size = tokens = cost = 0
        for one in pending[:MAX_REQUESTS]:
            line = b'{"custom_id":"%b","method":"POST","url":"/v1/chat/completions","body":%b}\n' % (
                one.request.key.encode(), one.request.body,
            )  # fmt: skip
            tokens, cost, size = tokens + one.tokens, cost + one.cost, size + len(line)
            exceeded = self.scheduler.budget.exceeded_limit(tokens, cost, len(keys) + 1)
            if exceeded is not None or size > MAX_BYTES:
                if not keys:
                    self.scheduler.exceeded = exceeded
                break
            lines.append(line)
            keys.append(one.request.key)
        if not keys:
            return None
        content = ("requests.jsonl", b"".join(lines), "application/jsonl")
        file = (await self._json("POST", "/files", files={"purpose": (None, "batch"), "file": content}))["id"]
        name = f"batch-{len(self.scheduler.journal.batches)}"
        state = {"state": "sent", "file": file, "keys": keys, "model": self.endpoint.model}
        self.scheduler.journal.note_batch(name, state)
        return name

    async def _complete(self, name: str, waiting: dict[str, PendingRequest]) -> None:
        """Start a batch unless it was started, wait for it, and report the outcomes of its requests."""
        scheduler = self.scheduler
        journal = scheduler.journal
        batch = journal.batches[name]
        sent = {key: waiting[key] for key in batch["keys"] if key in waiting}
        for key, one in sent.items():
            scheduler.sending(one, resumed=key in journal.unsettled)
        if "id" not in batch:
            journal.note_batch(name, {"state": "started", "id": await self._start(batch["file"])})
        ended = await self._wait(batch["id"])
        if ended is None:
            return
        replies = {}
        for part in ("output_file_id", "error_file_id"):
            if ended.get(part):
                content = await self._send(f"/files/{ended[part]}/content")
                replies.update({line["custom_id"]: line for line in map(json.loads, content.splitlines()) if line})
        for key, one in sent.items():
            if self._settle(one, replies.get(key) or {}, str(ended.get("status"))):
                del waiting[key]
        journal.note_batch(name, {"state": "done"})

    def _settle(self, pending: PendingRequest, line: Mapping[str, Any], status: str) -> bool:
        """Report the outcome of a request, given its line of a batch; return whether the request is finished."""
        scheduler, reply = self.scheduler, line.get("response")
        if reply:
            response = parse_response(reply["status_code"], {}, canonical_json(reply["body"]))
        else:
            detail = str((line.get("error") or {}).get("message") or status)
            response = CallError("not in the batch", detail)
        if isinstance(response, ValidResponse):
            scheduler.answered(pending, response)
            return True
        if isinstance(response, FatalResponse):
            scheduler.failed(pending, CallError("refused", response.what))
            scheduler.fatal = EndpointError(response.what, where=self.endpoint.url, remedy=response.remedy)
            return False
        if response.refused or pending.attempts >= self.endpoint.attempts:
            scheduler.give_up(pending, response)
            return True
        scheduler.failed(pending, response)
        return False

    async def _start(self, file: str) -> str:
        """The id of a file's batch, which is created if there is none."""
        for batch in (await self._json("GET", "/batches?limit=100")).get("data") or []:
            if batch.get("input_file_id") == file:
                return str(batch["id"])
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        return str((await self._json("POST", "/batches", canonical_json(body)))["id"])

    async def _wait(self, batch_id: str) -> dict[str, Any] | None:
        """The batch once it has ended; ``None`` if the user asks to stop first."""
        while True:
            batch = await self._json("GET", f"/batches/{batch_id}")
            completed = int((batch.get("request_counts") or {}).get("completed") or 0)
            self.scheduler.counts.done = self.scheduler.counts.cached + completed
            if batch["status"] not in RUNNING:
                return batch
            until = time.monotonic() + self.endpoint.poll
            while time.monotonic() < until:
                if self.scheduler.is_over:
                    return None
                await asyncio.sleep(min(0.2, self.endpoint.poll))

    async def _json(
        self, method: str, path: str, body: bytes = b"", files: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        raw = await self._send(path, method, body, files)
        try:
            reply = json.loads(raw)
            if not isinstance(reply, dict):
                raise ValueError
        except ValueError:
            raise EndpointError(
                f"{method} {path}: the reply is not a JSON object", where=self.endpoint.url,
                remedy="if the server has no batch API, set endpoint.api to live",
            ) from None  # fmt: skip
        return reply

    async def _send(
        self, path: str, method: str = "GET", body: bytes = b"", files: dict[str, Any] | None = None
    ) -> bytes:
        """The body of a reply, with retries. These calls cost nothing, so the budget does not count them."""
        for attempt in range(self.endpoint.attempts):
            reply = await self.connections.send(method, path, body, self.endpoint.timeout, files=files)
            if not isinstance(reply, CallError) and 200 <= reply[0] < 300:
                return reply[2]
            error = reply if isinstance(reply, CallError) else parse_response(*reply)
            if not isinstance(error, CallError) or error.refused:
                break
            await asyncio.sleep(max(min(LONGEST_WAIT, FIRST_WAIT * 2.0**attempt), error.after or 0.0))
        what, remedy = (
            getattr(error, "detail", "") or "no answer",
            "run the same command again: it continues the batch",
        )
        if isinstance(error, FatalResponse):
            what, remedy = error.what, error.remedy
        raise EndpointError(f"{method} {path}: {what}", where=self.endpoint.url, remedy=remedy)
