"""Requests by the file: sent up, polled for, fetched, at half the price.

A batch is in the journal from the moment its file is up, and is found again by that file should the process die
before it learnt the batch's name: no batch is paid for twice.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from tutelage.config import EndpointConfig
from tutelage.errors import EndpointError
from tutelage.generation.client import FIRST_WAIT, LONGEST_WAIT, ConnectionPool
from tutelage.generation.requests import canonical
from tutelage.generation.response_errors import (
    FatalResponse,
    RequestRefused,
    RetryableError,
    ValidResponse,
    parse_response,
)
from tutelage.generation.scheduler import ApiKey, PendingRequest, Scheduler

MOST_REQUESTS = 50_000
MOST_BYTES = 90_000_000
"""What one file may hold."""

WORKING = ("validating", "in_progress", "finalizing", "cancelling")


class BatchClient:
    """Chat completions of one server, by files.

    Args:
        endpoint: where.
        desk: is told what came of each request.
    """

    def __init__(self, endpoint: EndpointConfig, desk: Scheduler) -> None:
        self.endpoint, self.desk = endpoint, desk
        self.lines = ConnectionPool(endpoint, ApiKey(endpoint))

    async def fetch(self, jobs: Sequence[PendingRequest]) -> None:
        """Ask until all jobs are answered or set aside, or the desk says stop, which leaves open batches to run."""
        waiting = {job.request.key: job for job in jobs}
        for name, batch in list(self.desk.journal.batches.items()):
            if batch["state"] != "done" and self.endpoint.model == batch["model"]:
                await self._see_through(name, waiting)
        while waiting and not self.desk.over:
            sent = await self._send(list(waiting.values()))
            if sent is not None:
                await self._see_through(sent, waiting)

    async def _send(self, jobs: Sequence[PendingRequest]) -> str | None:
        """Send a file of as many requests as the budget allows; the name of its batch."""
        lines: list[bytes] = []
        chosen: list[PendingRequest] = []
        size, held = 0, [0, 0]
        for job in jobs[:MOST_REQUESTS]:
            line = b'{"custom_id":"%b","method":"POST","url":"/v1/chat/completions","body":%b}\n' % (
                job.request.key.encode(), job.request.body,
            )  # fmt: skip
            refusal = self.desk.budget.forbids(held[0] + job.tokens, held[1] + job.cost, len(chosen) + 1)
            if refusal is not None or size + len(line) > MOST_BYTES:
                if not chosen:
                    self.desk.refusal = refusal
                break
            held = [held[0] + job.tokens, held[1] + job.cost]
            size += len(line)
            lines.append(line)
            chosen.append(job)
        if not chosen:
            return None
        boundary = uuid.uuid4().hex
        form = (
            f'--{boundary}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--{boundary}\r\n'
            'content-disposition: form-data; name="file"; filename="requests.jsonl"\r\n'
            "content-type: application/jsonl\r\n\r\n"
        )
        body = form.encode() + b"".join(lines) + f"\r\n--{boundary}--\r\n".encode()
        kind = {"content-type": f"multipart/form-data; boundary={boundary}"}
        file = (await self._control("POST", "/files", body, kind))["id"]
        name = f"batch-{len(self.desk.journal.batches)}"
        keys = [job.request.key for job in chosen]
        self.desk.journal.note_batch(
            name, {"state": "sent", "file": file, "keys": keys, "model": self.endpoint.model}
        )  # fmt: skip
        return name

    async def _see_through(self, name: str, waiting: dict[str, PendingRequest]) -> None:
        """Start a batch unless it was, wait for it, and settle its requests."""
        desk = self.desk
        batch = desk.journal.batches[name]
        jobs = {key: waiting[key] for key in batch["keys"] if key in waiting}
        for key, job in jobs.items():
            desk.resuming(job) if key in desk.journal.unsettled else desk.sending(job)
        if "id" not in batch:
            desk.journal.note_batch(name, {"state": "started", "id": await self._start(batch["file"])})
        found = await self._ended(batch["id"])
        if found is None:
            return
        replies = {}
        for part in ("output_file_id", "error_file_id"):
            if found.get(part):
                content = await self._fetch(f"/files/{found[part]}/content")
                replies.update({line["custom_id"]: line for line in map(json.loads, content.splitlines()) if line})
        for key, job in jobs.items():
            if self._settle(job, replies.get(key), found):
                del waiting[key]
        desk.journal.note_batch(name, {"state": "done"})

    def _settle(self, job: PendingRequest, line: Mapping[str, Any] | None, batch: Mapping[str, Any]) -> bool:
        """Tell the desk what a batch says of a request; whether that is its end."""
        response = (line or {}).get("response")
        if response:
            verdict = parse_response(response["status_code"], {}, canonical(response["body"]))
        else:
            said = str(((line or {}).get("error") or {}).get("message") or batch.get("status"))
            verdict = RetryableError("not in the batch", detail=said)
        match verdict:
            case ValidResponse():
                self.desk.answered(job, verdict)
                return True
            case RequestRefused():
                self.desk.set_aside(job, verdict, again=False)
                return True
            case FatalResponse():
                self.desk.failed(job, RetryableError("refused", detail=verdict.what))
                self.desk.fatal = EndpointError(verdict.what, where=self.endpoint.url, remedy=verdict.remedy)
                return False
        if job.attempts >= self.endpoint.attempts:
            self.desk.set_aside(job, verdict, again=not verdict.final)
            return True
        self.desk.failed(job, verdict)
        return False

    async def _start(self, file: str) -> str:
        """The batch of a file: the one that there is, or a new one."""
        known = (await self._control("GET", "/batches?limit=100", b"")).get("data") or []
        for batch in known:
            if batch.get("input_file_id") == file:
                return str(batch["id"])
        wanted = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        return str((await self._control("POST", "/batches", canonical(wanted)))["id"])

    async def _ended(self, name: str) -> dict[str, Any] | None:
        """The batch once it has ended; ``None`` where a person wants to stop first."""
        while True:
            batch = await self._control("GET", f"/batches/{name}", b"")
            counts = batch.get("request_counts") or {}
            self.desk.meter.done = self.desk.meter.kept + int(counts.get("completed") or 0)
            if batch["status"] not in WORKING:
                return batch
            until = time.monotonic() + self.endpoint.poll
            while time.monotonic() < until:
                if self.desk.over:
                    return None
                await asyncio.sleep(min(0.2, self.endpoint.poll))

    async def _control(
        self, method: str, path: str, body: bytes, kind: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """The JSON object that a call other than a completion gives."""
        raw = await self._fetch(path, method, body, kind)
        try:
            found = json.loads(raw)
            if not isinstance(found, dict):
                raise ValueError
        except ValueError:
            raise EndpointError(
                f"{method} {path} gave no JSON object", where=self.endpoint.url,
                remedy="does the server have batches? Else set endpoint.api to live",
            ) from None  # fmt: skip
        return found

    async def _fetch(
        self, path: str, method: str = "GET", body: bytes = b"", kind: dict[str, str] | None = None
    ) -> bytes:
        for attempt in range(self.endpoint.attempts):
            reply = await self.lines.send(method, path, body, self.endpoint.timeout, kind)
            if not isinstance(reply, RetryableError) and 200 <= reply[0] < 300:
                return reply[2]
            verdict = reply if isinstance(reply, RetryableError) else parse_response(*reply)
            if not isinstance(verdict, RetryableError):
                break
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2.0**attempt)
            await asyncio.sleep(max(wait, verdict.after or 0.0))
        what = verdict.what if isinstance(verdict, FatalResponse) else getattr(verdict, "detail", "") or "no answer"
        remedy = (
            verdict.remedy
            if isinstance(verdict, FatalResponse)
            else "run the same command again; a batch is not lost"
        )
        raise EndpointError(f"{method} {path}: {what}", where=self.endpoint.url, remedy=remedy)

    async def close(self) -> None:
        """Close all connections."""
        await self.lines.close()
