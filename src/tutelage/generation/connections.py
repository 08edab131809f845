"""HTTP connections to an endpoint, and its API key.

The transport of httpx2 is used directly, one connection for each request in flight. The openai package builds a typed
object from every reply and retries internally, which would hide calls from the budget (``benchmarks/generate.py``
measures both).
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import urllib.request
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tutelage.config import EndpointConfig
from tutelage.errors import ConfigError
from tutelage.generation.requests import CallError

if TYPE_CHECKING:
    import ssl

    import httpx2


def _read_key(endpoint: EndpointConfig) -> tuple[str | None, list[str]]:
    """The authorization header with an endpoint's key or login, and the secrets in it."""
    if endpoint.key_env is not None:
        key = os.environ.get(endpoint.key_env, "").strip()
        where = f"environment variable {endpoint.key_env}"
        if not key:
            raise ConfigError("the variable is not set; it must hold the API key", where=where,
                              remedy=f"export {endpoint.key_env}=..., or change endpoint.key_env")  # fmt: skip
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError("is not an API key: it has spaces or non-ASCII characters", where=where,
                              remedy="set the variable to the key, with nothing before or after it")  # fmt: skip
        return f"Bearer {key}", [key]
    if endpoint.login is not None:
        encoded = base64.b64encode(":".join(endpoint.login).encode()).decode()
        return f"Basic {encoded}", [secret for secret in (endpoint.login[1], encoded) if secret]
    return None, []


class ConnectionPool:
    """Connections to a server, each for one request at a time."""

    def __init__(self, endpoint: EndpointConfig) -> None:
        import httpx2

        authorization, self._secrets = _read_key(endpoint)
        self._url = httpx2.URL(endpoint.url + "/")
        self._headers = {
            "host": self._url.netloc.decode(), "accept": "application/json", "accept-encoding": "gzip",
            "content-type": "application/json", "user-agent": "tutelage",
            **({} if authorization is None else {"authorization": authorization}),
        }  # fmt: skip
        self._targets: dict[str, Any] = {}
        self._idle: list[httpx2.AsyncHTTPTransport] = []
        self._context: ssl.SSLContext | bool = httpx2.create_ssl_context() if self._url.scheme == "https" else False
        proxies = {} if urllib.request.proxy_bypass(self._url.host) else urllib.request.getproxies()
        self._proxy = proxies.get(self._url.scheme) or proxies.get("all")

    def _open(self) -> httpx2.AsyncHTTPTransport:
        import httpx2

        if self._idle:
            return self._idle.pop()
        limits = httpx2.Limits(max_connections=1, max_keepalive_connections=1)
        return httpx2.AsyncHTTPTransport(verify=self._context, limits=limits, proxy=self._proxy)

    async def send(
        self, method: str, path: str, body: bytes, timeout: float, *, files: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, str], bytes] | CallError:
        """Status, headers and body of a reply, or the error of the connection. Neither contains the key.

        ``files`` are the fields of a multipart form, which replaces the JSON body.
        """
        import httpx2

        url = self._targets.get(path) or self._targets.setdefault(path, self._url.join(path.lstrip("/")))
        timeouts = dict.fromkeys(("connect", "read", "write", "pool"), timeout)
        headers = {k: v for k, v in self._headers.items() if files is None or k != "content-type"}
        content = None if files is not None else body
        request = httpx2.Request(
            method, url, content=content, files=files, headers=headers, extensions={"timeout": timeouts}
        )
        connection = self._open()
        is_complete = False
        try:
            async with asyncio.timeout(timeout):
                response = await connection.handle_async_request(request)
                try:
                    raw = await response.aread()
                    is_complete = True
                finally:
                    await response.aclose()
        except (TimeoutError, httpx2.TimeoutException):
            return CallError("time-out", f"{timeout:g} s", billed=True, overloaded=True)
        except httpx2.ConnectError as error:
            return CallError("cannot be reached", self._message(error))
        except (httpx2.HTTPError, OSError) as error:
            return CallError("connection lost", self._message(error), billed=True)
        finally:
            if is_complete:
                self._idle.append(connection)
            else:
                await asyncio.shield(_close(connection))
        lower = {name.lower(): value for name, value in response.headers.items()}
        return response.status_code, lower, self._redact(raw)

    def _redact(self, body: bytes) -> bytes:
        """A server's reply without the key, in case the server repeats the key."""
        for secret in self._secrets:
            body = body.replace(secret.encode(), b"***")
        return body

    def _message(self, error: Exception) -> str:
        return self._redact(str(error)[:200].encode()).decode()

    async def list_models(self) -> list[str]:
        """Names of up to 8 models that the server lists."""
        reply = await self.send("GET", "/models", b"", 10.0)
        if not isinstance(reply, CallError):
            with suppress(ValueError, LookupError, TypeError):
                return [str(model["id"]) for model in json.loads(reply[2])["data"]][:8]
        return []

    async def close(self) -> None:
        """Close all connections."""
        while self._idle:
            await _close(self._idle.pop())


async def _close(connection: httpx2.AsyncHTTPTransport) -> None:
    with suppress(Exception):  # a broken connection may fail to close
        await connection.aclose()
