"""The parts of HTTP that the answers need: bounded bodies, streams that notice who left, guarded entrance."""

import asyncio
import hashlib
import hmac
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trinity.config import ServeConfig
from trinity.serve.errors import ApiError
from trinity.serve.metrics import Metrics

PATIENCE_SECONDS, PATIENCE_BODIES = 1.0, 8
"""How long, and how many times the largest body, is read and thrown away of a body that is too large."""
STALL_SECONDS = 60.0
"""A client of a stream that takes nothing for so long has left; it would hold a place among those that may wait."""
SEND_GRACE = 5.0
"""Seconds beyond a request's deadline in which its last words may still be sent."""
OPEN_PATHS = ("/", "/health")
"""Paths that need no key."""
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Bodies:
    """Bytes of all bodies that are in memory before they are read. Used on the event loop only."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    def take(self, count: int) -> None:
        """Raises ApiError when there is no room now."""
        if self.held + count > self.most:
            raise ApiError(503, "too many large requests are being read; try again", headers={"Retry-After": "1"})
        self.held += count


@asynccontextmanager
async def body_of(request: Request, config: ServeConfig, bodies: Bodies) -> AsyncIterator[bytes]:
    """The body of a JSON request, counted among `bodies` until the block ends.

    Raises ApiError when it is too large, too slow or declared as something else.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps web pages of other origins out: they may send other types without asking.
        raise ApiError(415, f"the content type is {kind or 'not given'}; send application/json")
    parts: list[bytes] = []
    size = 0
    try:
        try:
            async with asyncio.timeout(config.body_seconds):
                async with aclosing(_parts(request, config.max_body_bytes)) as received:
                    async for part in received:
                        bodies.take(len(part))
                        size += len(part)
                        parts.append(part)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {config.body_seconds:g} seconds") from None
        body = b"".join(parts)
        parts.clear()
        yield body
    finally:
        bodies.held -= size


async def _parts(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """Raises ApiError beyond `most` bytes."""
    declared = request.headers.get("content-length", "")
    left = -1 if declared.isdigit() and int(declared) > most else most
    stream = request.stream()
    if left >= 0:
        async for part in stream:
            left -= len(part)
            if left < 0:
                break
            yield part
        else:
            return
    # A client that is still sending would find a connection that was reset instead of the answer.
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(PATIENCE_SECONDS):
            rest = PATIENCE_BODIES * most
            async for part in stream:
                rest -= len(part)
                if rest < 0:
                    break
    raise ApiError(413, f"the body is larger than the {most} bytes that this server takes", code="body_too_large")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, which is cancelled when the client leaves; then raises ClientDisconnect."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. `close` is called however the stream ends; the events may take until `deadline`."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], close: Callable[[], None], deadline: float, metrics: Metrics
    ) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._events, self._close, self._deadline, self._metrics = events, close, deadline, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end; a client that leaves, or does not read in time, ends the generation."""
        try:
            async with asyncio.timeout_at(self._deadline + SEND_GRACE):
                await unless_gone(receive, self._pump(send))
        except (ClientDisconnect, TimeoutError):
            self._metrics.disconnects.inc()
        finally:
            self._close()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            async for chunk in events:
                async with asyncio.timeout(STALL_SECONDS):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Guard:
    """Stands before everything: Host, key, counting, and the last resort for what was not foreseen."""

    def __init__(
        self,
        app: ASGIApp,
        config: ServeConfig,
        api_key: str | None,
        metrics: Callable[[], Metrics],
        paths: frozenset[str],
    ) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths
        self._hosts = {*LOOPBACK_NAMES, *config.allowed_hosts} if config.on_loopback else None
        # Digests have one length, so that comparing them tells nothing about the key's.
        self._key = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # the client left before an answer began

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            headers = Headers(scope=scope)
            try:
                self._check_host(headers)
                self._check_key(scope["path"], headers)
            except ApiError as error:
                await error_response(error)(scope, receive, watch)
                return
            await self._app(scope, receive, watch)
        except ClientDisconnect:  # in the middle of its own request: nobody is left to be told
            self._metrics().disconnects.inc()
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics().requests.labels(path, str(status)).inc()

    def _check_host(self, headers: Headers) -> None:
        if self._hosts is None:
            return
        host = headers.get("host", "")
        name = host.rsplit(":", 1)[0] if host.rsplit(":", 1)[-1].isdigit() else host
        if name.lower() not in self._hosts:
            raise ApiError(403, f"this server does not answer to the name {name!r}; see --allow-host")

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._key is None or path in OPEN_PATHS:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("latin-1")).digest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest, self._key):
            told = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, told, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def error_response(error: ApiError) -> JSONResponse:
    """An error in OpenAI's form."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def plain_error(status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error that the framework found: no such path, wrong method."""
    return error_response(ApiError(status, detail, headers=headers))
