"""The server's paths: chat completions, completions, models, health, metrics and a page to chat in."""

import asyncio
import base64
import hashlib
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from importlib import resources
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from trinity.base.errors import UserError
from trinity.config import ServeConfig
from trinity.infer.engine import Engine
from trinity.infer.paths import use_kernels
from trinity.model.transformer import Transformer
from trinity.serve.answers import ChatChoice, Choice, Envelope, TextChoice, event
from trinity.serve.errors import ApiError, bad
from trinity.serve.http import Bodies, EventStream, Guard, body_of, error_response, plain_error, unless_gone
from trinity.serve.metrics import CONTENT_TYPE, Metrics
from trinity.serve.prompts import Prompts
from trinity.serve.protocol import ChatRequest, CompletionRequest, check_choices, parse
from trinity.serve.tickets import Desk, Ticket
from trinity.serve.worker import Gauges, Worker
from trinity.tokenizer import Tokenizer

log = logging.getLogger("trinity.serve")
BODIES = 16
"""So many of the largest bodies may be in memory before they are read."""
QUIET_SECONDS = 10.0
"""A stream without a token for so long gets a comment, so that nobody between takes it for dead."""


class Service:
    """A model behind HTTP. `app` is the ASGI application; it starts and ends the engine's thread with itself."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        config: ServeConfig,
        *,
        api_key: str | None = None,
        cache_tokens: int | None = None,
    ) -> None:
        if config.fp8_weights and not use_kernels(model, "auto"):
            raise UserError("--fp8-weights needs a GPU and a model that the kernels serve; export as fp8-block instead")
        self.config = config
        self.cache_tokens = cache_tokens or config.max_cache_tokens or config.max_batch * model.config.max_positions
        self.prompts = Prompts(tokenizer, config, model.config.max_positions, self.cache_tokens)
        self.desk = Desk(config.max_batch, config.max_queued)
        self.bodies = Bodies(BODIES * config.max_body_bytes)
        self.worker: Worker | None = None
        self.metrics = Metrics(config.name, lambda: self.worker.gauges if self.worker else Gauges())
        self._tokenizer = tokenizer
        self._make_engine: Callable[[], Engine] = partial(
            Engine,
            model,
            tokenizer,
            max_batch=config.max_batch,
            max_tokens=self.cache_tokens,
            prefill_chunk=config.prefill_chunk,
            cache_dtype=torch.float8_e4m3fn if config.cache == "fp8" else None,
            fp8_weights=config.fp8_weights,
        )
        self._readers = ThreadPoolExecutor(2, "tokenizer")
        self._page, self._page_policy = load_page()
        routes = [
            Route("/", self._chat_page),
            Route("/health", self._health),
            Route("/metrics", self._metrics_page),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
        ]
        starlette = Starlette(
            routes=routes,
            lifespan=self._lifespan,
            exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _unforeseen},
        )
        paths = frozenset(route.path for route in routes)
        self.app: ASGIApp = Guard(starlette, config, api_key, lambda: self.metrics, paths)

    def drain(self) -> None:
        """Take no more requests; those under way go on."""
        self.desk.draining = True

    def abandon(self) -> None:
        """End the answers that are still under way with an error."""
        if self.worker is not None:
            self.worker.fail_all(ApiError(503, "the server is shutting down", code="shutting_down"))

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        self.worker = Worker(self._make_engine, asyncio.get_running_loop())
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.stop)
            self._readers.shutdown(wait=False, cancel_futures=True)

    async def _chat(self, request: Request) -> Response:
        deadline = asyncio.get_running_loop().time() + self.config.request_seconds
        ticket: Ticket | None = None
        try:
            async with body_of(request, self.config, self.bodies) as body:
                ask = parse(ChatRequest, body)
                self._check(ask)
                ticket = self._ticket(ask.choices)
                prompt = await self._read(self.prompts.chat, ask)
            params = ask.sampling(prompt.max_tokens, prompt.stop_ids, ask.top_logprobs or 0, prompt.stops)
            ticket.start([prompt.ids] * ask.choices, params)
            self.metrics.prompt_tokens.inc(len(prompt.ids))
            choices = [
                ChatChoice(index, self._tokenizer, prompt.stop_ids, prompt.parser(), wants_logprobs=bool(ask.logprobs))
                for index in range(ask.choices)
            ]
            envelope = Envelope(
                "chatcmpl", self.config.name, len(prompt.ids), chat=True, include_usage=ask.include_usage
            )
            return await self._answer(request, ask, ticket, choices, envelope, deadline)
        except BaseException:
            if ticket is not None:
                ticket.close()
            raise

    async def _complete(self, request: Request) -> Response:
        deadline = asyncio.get_running_loop().time() + self.config.request_seconds
        ticket: Ticket | None = None
        try:
            async with body_of(request, self.config, self.bodies) as body:
                ask = parse(CompletionRequest, body)
                self._check(ask)
                texts = self.prompts.split(ask.prompt)
                ticket = self._ticket(len(texts) * ask.choices)
                prompts = await self._read(self.prompts.complete, ask, texts)
            stop_ids = tuple(self._tokenizer.stop_ids)
            params = [p for one in prompts for p in ask.sampling(one.max_tokens, stop_ids, ask.logprobs or 0)]
            spread = [one for one in prompts for _ in range(ask.choices)]
            ticket.start([one.ids for one in spread], params)
            total = sum(len(one.ids) for one in prompts)
            self.metrics.prompt_tokens.inc(total)
            choices = [
                TextChoice(
                    index,
                    self._tokenizer,
                    stop_ids,
                    one.text if ask.echo else "",
                    wants_logprobs=ask.logprobs is not None,
                )
                for index, one in enumerate(spread)
            ]
            envelope = Envelope("cmpl", self.config.name, total, chat=False, include_usage=ask.include_usage)
            return await self._answer(request, ask, ticket, choices, envelope, deadline)
        except BaseException:
            if ticket is not None:
                ticket.close()
            raise

    async def _answer(
        self,
        request: Request,
        ask: ChatRequest | CompletionRequest,
        ticket: Ticket,
        choices: Sequence[ChatChoice] | Sequence[TextChoice],
        envelope: Envelope,
        deadline: float,
    ) -> Response:
        if ask.stream:
            events = _stream(ticket, choices, envelope, deadline)
            return EventStream(events, ticket.close, deadline, self.metrics)
        try:
            await unless_gone(request.receive, _collect(ticket, choices, deadline))
        except ClientDisconnect:
            self.metrics.disconnects.inc()
            return Response(status_code=499)
        finally:
            ticket.close()
        return JSONResponse(envelope.whole([choice.whole() for choice in choices], _new_tokens(choices)))

    def _check(self, ask: ChatRequest | CompletionRequest) -> None:
        check_choices(ask)
        if ask.model is not None and ask.model != self.config.name:
            raise ApiError(
                404,
                f"the model {ask.model!r} is not served here; {self.config.name!r} is",
                param="model",
                code="model_not_found",
            )

    def _ticket(self, answers: int) -> Ticket:
        assert self.worker is not None
        return Ticket(self.desk, self.worker, self.metrics, answers)

    async def _read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Rendering and tokenizing, which may take seconds for a book, beside the loop."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, function, *arguments)
        except UserError as error:
            raise bad(str(error)) from None

    async def _models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.config.name:
            raise ApiError(404, f"the model {name!r} is not served here", param="model", code="model_not_found")
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.config.name,
            "object": "model",
            "created": self.prompts.created,
            "owned_by": "trinity",
            "max_model_len": self.prompts.max_positions,
        }

    async def _health(self, _request: Request) -> Response:
        well = self.worker is not None and self.worker.alive and not self.desk.draining
        state = "ok" if well else "shutting down" if self.desk.draining else "the engine has stopped"
        return JSONResponse({"status": state}, status_code=200 if well else 503)

    async def _metrics_page(self, _request: Request) -> Response:
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _chat_page(self, _request: Request) -> Response:
        headers = {
            "Content-Security-Policy": self._page_policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return HTMLResponse(self._page, headers=headers)


async def _collect(ticket: Ticket, choices: Sequence[ChatChoice] | Sequence[TextChoice], deadline: float) -> None:
    async for item in ticket.pieces(deadline):
        if item is not None:
            choices[item[0]].take(item[1])


async def _stream(
    ticket: Ticket,
    choices: Sequence[ChatChoice] | Sequence[TextChoice],
    envelope: Envelope,
    deadline: float,
) -> AsyncGenerator[bytes, None]:
    """The events of a stream; an error that comes after the first of them is an event too."""
    try:
        for choice in choices:
            if isinstance(choice, ChatChoice):
                yield envelope.chunk(choice.opening())
        async for item in ticket.pieces(deadline, QUIET_SECONDS):
            if item is None:
                yield b": still at work\n\n"
                continue
            chunks = [envelope.chunk(delta) for delta in choices[item[0]].take(item[1])]
            if chunks:
                yield b"".join(chunks)
        yield envelope.last(_new_tokens(choices))
    except ApiError as error:
        yield event(error.body())
    except Exception as error:
        log.error("a stream failed", exc_info=error)
        yield event(ApiError(500, "the server failed; see its log").body())


def _new_tokens(choices: Sequence[Choice]) -> int:
    return sum(choice.tokens for choice in choices)


async def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return plain_error(error.status_code, f"{request.method} {request.url.path}: {error.detail}", error.headers)


async def _unforeseen(_request: Request, error: Exception) -> Response:
    if not isinstance(error, ClientDisconnect):
        log.error("a request failed", exc_info=error)
    return plain_error(500, "the server failed; see its log")


def load_page() -> tuple[str, str]:
    """The chat page, and the policy under which a browser runs its own script and style and nothing else."""
    page = (resources.files("trinity") / "serve" / "page.html").read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        found = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert found is not None
        return base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()

    policy = (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy
