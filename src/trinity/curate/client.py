"""Asks servers in OpenAI's protocol: several at once, with limits, retries and deadlines; nothing of it is silent.

Connections are kept open, one for each request under way. An answer counts only when it is whole: JSON with a choice
that holds text, inside the deadline. What an endpoint did wrong is counted by kind.
"""

import http.client
import json
import os
import random
import select
import socket
import ssl
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from urllib.parse import urlsplit

from trinity.base.errors import UserError
from trinity.config.curate import CurateConfig, EndpointConfig, GenerateConfig
from trinity.curate.answers import Answer
from trinity.curate.purse import most_tokens
from trinity.curate.requests import Request

_BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_MISTAKE = (401, 403, 404, 405)
_MOST_BYTES = 64 << 20
_LONGEST_WAIT = 60.0
MILLION = 1e6


class PurseLike(Protocol):
    def take(self, tokens: int, money: float) -> bool: ...
    def settle(self, tokens: int, money: float) -> None: ...


class FailedError(Exception):
    """One attempt failed; `kind` is what the report counts, `tokens` those of prompt and answer that were spent."""

    def __init__(
        self,
        kind: str,
        *,
        final: bool = False,
        unreachable: bool = False,
        wait: float = 0.0,
        tokens: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(kind)
        self.kind, self.final, self.unreachable, self.wait, self.tokens = kind, final, unreachable, wait, tokens


@dataclass
class _Endpoint:
    config: EndpointConfig
    slots: threading.Semaphore
    idle: list[http.client.HTTPConnection] = field(default_factory=list)
    resting_until: float = 0.0
    failures: int = 0


class Client:
    """`ask` may be called from as many threads as `slots`; more wait."""

    def __init__(self, config: CurateConfig, endpoints: tuple[EndpointConfig, ...], purse: PurseLike) -> None:
        self.config, self._purse = config, purse
        self._settings: GenerateConfig = config.generate
        self._endpoints = [_Endpoint(one, threading.Semaphore(one.concurrency)) for one in endpoints]
        self._lock = threading.Lock()
        self._next = 0
        self._reached = time.monotonic()
        for one in endpoints:
            if one.key_variable is not None and not os.environ.get(one.key_variable):
                raise UserError(f"the environment variable {one.key_variable}, the API key of {one.url}, is not set")

    @property
    def slots(self) -> int:
        return sum(endpoint.config.concurrency for endpoint in self._endpoints)

    def close(self) -> None:
        """Close the connections that lie idle."""
        for endpoint in self._endpoints:
            while endpoint.idle:
                endpoint.idle.pop().close()

    def ask(self, request: Request) -> Answer | None:
        """The answer, or the failure of the last attempt; None when the budget does not allow the request.

        Raises UserError when no endpoint has been reachable for `patience` seconds, or one refuses key or model.
        """
        body = request.body(self.config)
        prompt, completion = most_tokens(sum(len(m["content"]) for m in body["messages"]), body["max_tokens"])
        used_prompt = used_completion = 0
        money = 0.0
        start = time.monotonic()
        attempt = 0
        troubles: Counter[str] = Counter()
        while True:
            with self._endpoint() as endpoint:
                aside = _price(endpoint.config, prompt, completion)
                if not self._purse.take(prompt + completion, aside):
                    if attempt == 0:
                        return None
                    failure = "budget used up between attempts"
                    break
                found: Answer | None = None
                failure, wait = "", 0.0
                tokens = (0, 0)
                try:
                    found, tokens = self._attempt(endpoint, request, body)
                    self._reached = time.monotonic()
                    endpoint.failures = 0
                except FailedError as failed:
                    failure, wait, tokens = failed.kind, failed.wait, failed.tokens
                    self._note(endpoint)
                    troubles[failed.kind] += 1
                    final = failed.final
                    unreachable = failed.unreachable
                else:
                    final = unreachable = False
                cost = _price(endpoint.config, *tokens)
                self._purse.settle(sum(tokens) - prompt - completion, cost - aside)
                used_prompt, used_completion, money = used_prompt + tokens[0], used_completion + tokens[1], money + cost
            if found is not None:
                return replace(
                    found,
                    prompt_tokens=used_prompt,
                    completion_tokens=used_completion,
                    money=money,
                    seconds=time.monotonic() - start,
                    attempts=attempt + 1,
                    troubles=dict(troubles),
                )
            if unreachable:  # no fault of the document: waits as long as patience lasts
                if time.monotonic() - self._reached > self._settings.patience:
                    raise UserError(
                        f"no endpoint could be reached for {self._settings.patience:g} seconds ({failure}); what is "
                        "done is kept: run the same command again once they are back"
                    )
                time.sleep(min(1.0, self._settings.backoff))
                continue
            attempt += 1
            if final or attempt > self._settings.retries:
                break
            pause = min(_LONGEST_WAIT, self._settings.backoff * 2 ** (attempt - 1))
            time.sleep(max(wait, pause * (0.5 + random.random() / 2)))
        return Answer(
            request.key,
            "",
            failure=failure,
            prompt_tokens=used_prompt,
            completion_tokens=used_completion,
            money=money,
            seconds=time.monotonic() - start,
            attempts=attempt,
            troubles=dict(troubles),
        )

    def _endpoint(self) -> "_Slot":
        """The endpoint with room whose turn it is; waits for one."""
        while True:
            now = time.monotonic()
            with self._lock:
                order = self._endpoints[self._next :] + self._endpoints[: self._next]
                self._next = (self._next + 1) % len(self._endpoints)
            awake = [one for one in order if one.resting_until <= now]
            awake = awake or [min(order, key=lambda one: one.resting_until)]
            for endpoint in awake:
                if endpoint.slots.acquire(blocking=False):
                    return _Slot(endpoint)
            if awake[0].slots.acquire(timeout=0.05):
                return _Slot(awake[0])

    def _note(self, endpoint: _Endpoint) -> None:
        with self._lock:
            endpoint.failures += 1
            if endpoint.failures >= 3 and len(self._endpoints) > 1:  # the others take over for a while
                endpoint.resting_until = time.monotonic() + min(_LONGEST_WAIT, 2.0 ** min(endpoint.failures - 3, 6))

    def _attempt(self, endpoint: _Endpoint, request: Request, body: dict[str, Any]) -> tuple[Answer, tuple[int, int]]:
        status, headers, data = self._post(endpoint, {"model": endpoint.config.model, **body})
        url = endpoint.config.url
        if status in _MISTAKE:
            raise UserError(f"{url} answered {status}: {data[:200].decode('utf-8', 'replace')}")
        if status != 200:
            wait = _retry_after(headers)
            raise FailedError(f"endpoint error {status}", final=status not in _BUSY, wait=wait)
        try:
            answer = json.loads(data)
            choice = answer["choices"][0]
            text, finish = choice["message"]["content"], str(choice.get("finish_reason") or "")
            usage = answer.get("usage") or {}
            tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise FailedError("endpoint gave rubbish") from None
        if text is not None and not isinstance(text, str):
            raise FailedError("endpoint gave rubbish")
        if not text or text.isspace():
            raise FailedError("endpoint gave an empty text", tokens=tokens)
        name = str(answer.get("model") or endpoint.config.model)
        return Answer(request.key, text, finish=finish, model=name, endpoint=url), tokens

    def _post(self, endpoint: _Endpoint, body: dict[str, Any]) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Raises FailedError for what the network does; the deadline holds for the whole answer, however it drips."""
        parts = urlsplit(endpoint.config.url)
        deadline = time.monotonic() + self._settings.timeout
        headers = {"Content-Type": "application/json"}
        if endpoint.config.key_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ[endpoint.config.key_variable]}"
        connection = self._idle(endpoint)
        try:
            if connection is None:
                maker = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
                connection = maker(parts.hostname or "", parts.port, timeout=min(30.0, self._settings.timeout))
                connection.connect()
            assert connection.sock is not None
            connection.sock.settimeout(max(0.01, deadline - time.monotonic()))
            connection.request("POST", f"{parts.path.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
            response = connection.getresponse()
            data = bytearray()
            while part := response.read1(1 << 16):
                data += part
                if time.monotonic() > deadline:
                    raise TimeoutError
                if len(data) > _MOST_BYTES:
                    raise FailedError("endpoint gave rubbish")
                if connection.sock is not None:
                    connection.sock.settimeout(max(0.01, deadline - time.monotonic()))
            response.close()  # it does not do so by itself when read piece by piece
            if response.will_close:
                connection.close()
            else:
                with self._lock:
                    endpoint.idle.append(connection)
            return response.status, response.headers, bytes(data)
        except TimeoutError:
            self._close(connection)
            raise FailedError("endpoint stalled") from None
        except FailedError:
            self._close(connection)
            raise
        except (ConnectionRefusedError, socket.gaierror, ssl.SSLError) as error:
            self._close(connection)
            raise FailedError(f"endpoint cannot be reached: {error.strerror or error}", unreachable=True) from None
        except (OSError, http.client.HTTPException) as error:
            self._close(connection)
            raise FailedError(f"endpoint broke off ({type(error).__name__})") from None

    def _idle(self, endpoint: _Endpoint) -> http.client.HTTPConnection | None:
        """A connection that the server has not closed since its last answer, or None."""
        while True:
            with self._lock:
                connection = endpoint.idle.pop() if endpoint.idle else None
            if connection is None or (
                connection.sock is not None and not select.select([connection.sock], [], [], 0)[0]
            ):
                return connection
            connection.close()

    @staticmethod
    def _close(connection: http.client.HTTPConnection | None) -> None:
        if connection is not None:
            connection.close()


class _Slot:
    def __init__(self, endpoint: _Endpoint) -> None:
        self._endpoint = endpoint

    def __enter__(self) -> _Endpoint:
        return self._endpoint

    def __exit__(self, *_: object) -> None:
        self._endpoint.slots.release()


def _price(endpoint: EndpointConfig, prompt: int, completion: int) -> float:
    return (prompt * endpoint.input_price + completion * endpoint.output_price) / MILLION


def _retry_after(headers: http.client.HTTPMessage) -> float:
    try:
        return min(_LONGEST_WAIT, max(0.0, float(headers.get("Retry-After") or 0)))
    except ValueError:
        return 0.0
