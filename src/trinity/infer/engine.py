"""Batched generation with continuous admission, on the weights of the model that is handed in.

Requests wait in a queue, take a slot of the cache when one is free, are prefilled in chunks and then decoded together,
one token a step; whoever finishes frees the slot for the next. What a request samples depends on its prompt, its
parameters and its seed alone, up to the rounding of sums in batches of another shape.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from trinity.base.errors import UserError
from trinity.infer.attention import Chunk, Step
from trinity.infer.cache import Cache
from trinity.infer.forward import forward
from trinity.infer.paths import Path, use_kernels
from trinity.infer.sampling import SamplingParams, TokenStream, most_probable, sample
from trinity.infer.text import Decoder, TextStream
from trinity.model.transformer import Transformer

if TYPE_CHECKING:
    from trinity.infer.lookahead import Lookahead

Finish = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass
class Completion:
    """What one request generated."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    """New tokens; the stop token, if one came, is the last."""
    logprobs: list[float] = dataclasses.field(default_factory=list)
    """Of each token, log_softmax of the model's logits as they are (temperature 1, nothing truncated)."""
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    """Of each token, the `SamplingParams.top_logprobs` most probable ones in its place, with log-probabilities."""
    text: str = ""
    """Decoded tokens without the stop token, cut before a stop string; empty when the engine has no tokenizer."""
    finish: Finish | None = None
    """"stop": a stop token or string came; "length": the tokens or the positions ran out; None: still running."""
    experts: np.ndarray | None = None
    """With `return_experts`, int16 [tokens fed, L, k]: the experts that each token of the prompt and of the answer (but
    the last, which was never fed) visited in each MoE layer, in descending order of biased score."""


class Request:
    """A prompt on its way through the engine."""

    def __init__(
        self, prompt: Sequence[int], params: SamplingParams, max_new_tokens: int, decoder: Decoder | None
    ) -> None:
        self.prompt = list(prompt)
        self.params = params
        self.max_new_tokens = max_new_tokens
        self.completion = Completion()
        self.slot: int | None = None
        self.fed = 0
        """Tokens that the cache holds."""
        self.uniform = TokenStream(params.seed)
        self.stream = TextStream(decoder, params.stop) if decoder is not None else None
        self.seen: torch.Tensor | None = None
        """bool [V] of tokens in the prompt and the answer, where a repetition penalty needs it."""
        self.routed: list[torch.Tensor] = []

    @property
    def done(self) -> bool:
        return self.completion.finish is not None


@dataclasses.dataclass(frozen=True)
class Event:
    """One new token of one request. `text` is what became certain with it, which may be nothing."""

    request: Request
    token: int
    logprob: float
    text: str
    finish: Finish | None


class Engine:
    """Generates for many requests at once.

    max_batch: requests decoded together. max_tokens: prompt and answer tokens that admitted requests may come to
    together, which bounds the cache; None: as many as max_batch requests of the model's positions. prefill_chunk:
    prompt tokens of one forward pass. cache_dtype: by default the type of the embedding's weights; float8_e4m3fn
    halves the cache of a bfloat16 model. The cache grows with use. path: see `paths.use_kernels`. fp8_weights: with
    the kernels, multiply with quantised copies of the weights (`ops.block_fp8`).
    """

    def __init__(
        self,
        model: Transformer,
        decoder: Decoder | None = None,
        *,
        max_batch: int = 32,
        max_tokens: int | None = None,
        prefill_chunk: int = 1024,
        block: int = 64,
        return_experts: bool = False,
        cache_dtype: torch.dtype | None = None,
        path: Path = "auto",
        fp8_weights: bool = False,
    ) -> None:
        self.model = model
        self.config = model.config
        self.decoder = decoder
        self.return_experts = return_experts
        self._device = model.embed.weight.device
        self._max_tokens = max_tokens or max_batch * self.config.max_positions
        self._prefill_chunk = prefill_chunk
        self.cache = Cache(
            self.config, max_batch, device=self._device, dtype=cache_dtype or model.embed.weight.dtype, block=block
        )
        self._ahead = None
        self._rows: list[Request] = []
        """Requests of the steps that are under way."""
        if use_kernels(model, path):
            from trinity.infer.kernels import Kernels
            from trinity.infer.lookahead import Lookahead

            limit = None if decoder is None else decoder.vocab_size
            kernels = Kernels(model, fp8=fp8_weights, limit=limit)
            self._ahead = Lookahead(kernels, self.cache, return_experts=return_experts)
        elif fp8_weights:
            raise UserError("FP8 weights need the kernels, which do not run here; quantise in an export instead")
        self._free_slots = list(range(max_batch - 1, -1, -1))
        self._waiting: deque[Request] = deque()
        self._prefilling: list[Request] = []
        self._decoding: list[Request] = []
        self._prefilled_last = False

    def describe(self) -> str:
        """The path of the forward pass in a few words, for a log."""
        return "reference" if self._ahead is None else self._ahead.kernels.describe()

    @property
    def num_running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Queue a prompt. Raises UserError when it is empty, has a token outside the vocabulary or cannot fit."""
        if not prompt:
            raise UserError("the prompt is empty; generation needs at least one token")
        if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
            raise UserError(f"the prompt has a token outside the vocabulary of {self.config.vocab_size}")
        if params.stop and self.decoder is None:
            raise UserError("stop strings need a tokenizer; give stop_ids instead")
        room = self.config.max_positions - len(prompt)
        if room < 1:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, which leaves no room in the model's {self.config.max_positions} "
                "positions"
            )
        request = Request(prompt, params, min(params.max_new_tokens, room), self.decoder)
        if len(prompt) + request.max_new_tokens > self._max_tokens:
            raise UserError(
                f"prompt and answer may come to {len(prompt) + request.max_new_tokens} tokens, but the engine holds "
                f"{self._max_tokens}; ask for fewer new tokens or raise max_tokens"
            )
        if params.repetition_penalty != 1.0:
            request.seen = torch.zeros(self.config.vocab_size, dtype=torch.bool, device=self._device)
            request.seen[torch.tensor(request.prompt, device=self._device)] = True
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Stop a request wherever it is; what it generated so far stays in its completion."""
        if not request.done:
            self._finish(request, "cancelled")

    def step(self) -> list[Event]:
        """Admit what fits, run one forward pass, and return the tokens it gave: none while prompts are being read."""
        with _evaluating(self.model):
            self._admit()
            # Where both wait they take turns: a long prompt must not silence the answers that are under way.
            if self._prefilling and not (self._decoding and self._prefilled_last):
                self._prefilled_last = True
                return self._prefill()
            self._prefilled_last = False
            return self._decode() if self._decoding else []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        on_token: Callable[[int, Event], None] | None = None,
    ) -> list[Completion]:
        """Completions in the order of `prompts`; `on_token` gets the number of the prompt and each event.

        One SamplingParams serves all prompts; with a seed, prompt i then uses seed + i, so that equal prompts differ.
        """
        if isinstance(params, SamplingParams):
            shared = params
            params = [
                shared if shared.seed is None else dataclasses.replace(shared, seed=shared.seed + i)
                for i in range(len(prompts))
            ]
        requests: list[Request] = []
        try:
            for prompt, own in zip(prompts, params, strict=True):
                requests.append(self.submit(prompt, own))
            numbers = {id(request): i for i, request in enumerate(requests)}
            with _evaluating(self.model):
                while not all(request.done for request in requests):
                    for event in self.step():
                        if on_token is not None and id(event.request) in numbers:
                            on_token(numbers[id(event.request)], event)
        finally:  # nothing to cancel but when an error or the caller interrupted
            for request in requests:
                self.cancel(request)
        return [request.completion for request in requests]

    def _admit(self) -> None:
        """First come, first served; a request reserves its longest possible length, so that none is ever evicted."""
        while self._waiting and self._free_slots:
            running = self._prefilling + self._decoding
            reserved = sum(len(r.prompt) + r.max_new_tokens for r in running)
            first = self._waiting[0]
            if reserved + len(first.prompt) + first.max_new_tokens > self._max_tokens:
                return
            self._waiting.popleft()
            first.slot = self._free_slots.pop()
            self._prefilling.append(first)

    def _prefill(self) -> list[Event]:
        budget = self._prefill_chunk
        chunks: list[Chunk] = []
        requests: list[Request] = []
        for request in self._prefilling:
            if budget == 0:
                break
            tokens = request.prompt[request.fed : request.fed + budget]
            assert request.slot is not None
            chunks.append(Chunk(request.slot, tokens))
            requests.append(request)
            budget -= len(tokens)
        x_ND, last_B = self._forward(requests, chunks)
        ready = [i for i, request in enumerate(requests) if request.fed == len(request.prompt)]
        if not ready:
            return []
        finished = [requests[i] for i in ready]
        self._prefilling = [request for request in self._prefilling if request not in finished]
        self._decoding += finished
        return self._sample(finished, self.model.head(x_ND[last_B[ready]]))

    def _decode(self) -> list[Event]:
        if self._ahead is not None:
            return self._decode_ahead(self._ahead)
        requests = list(self._decoding)
        chunks = []
        for request in requests:
            assert request.slot is not None
            chunks.append(Chunk(request.slot, request.completion.tokens[-1:]))
        x_ND, last_B = self._forward(requests, chunks)
        return self._sample(requests, self.model.head(x_ND[last_B]))

    def _decode_ahead(self, ahead: "Lookahead") -> list[Event]:
        """The tokens of the oldest step under way, while the device is busy with the next one.

        The next step is launched before that only when it is certain to be wanted: the same requests, none of which
        ends by its length. Where the host must know a token before another is chosen, or reports on its rivals, nothing
        runs ahead.
        """
        if not ahead.num_launched:
            self._rows = list(self._decoding)
            ahead.start([_slot(r) for r in self._rows], [r.completion.tokens[-1] for r in self._rows])
            if any(request.seen is not None or request.params.top_logprobs for request in self._rows):
                ahead.launch()
                for i, request in enumerate(self._rows):
                    self._fed(request, ahead.experts(i))
                return self._sample(self._rows, ahead.logits_BV)
            self._launch(ahead)
        rows = self._rows
        if rows == self._decoding and all(len(r.completion.tokens) + 1 < r.max_new_tokens for r in rows):
            self._launch(ahead)
        tokens, logprobs, experts_LBk = ahead.collect()
        events = []
        for i, request in enumerate(rows):
            if not request.done:  # else: stopped or cancelled while this step was under way
                self._fed(request, None if experts_LBk is None else experts_LBk[:, i])
                request.completion.top_logprobs.append([])
                events.append(self._take(request, tokens[i], logprobs[i]))
        return events

    def _launch(self, ahead: "Lookahead") -> None:
        ahead.launch()
        params = [request.params for request in self._rows]
        if any(p.temperature > 0 for p in params):
            uniform = [request.uniform.next() if request.params.temperature > 0 else 0.0 for request in self._rows]
            ahead.choose(*sample(ahead.logits_BV, params, uniform, [None] * len(params), self._vocab_size))
        ahead.send()

    def _fed(self, request: Request, experts_Lk: torch.Tensor | None) -> None:
        request.fed += 1
        if experts_Lk is not None:
            request.routed.append(experts_Lk[None])

    def _forward(self, requests: Sequence[Request], chunks: Sequence[Chunk]) -> tuple[torch.Tensor, torch.Tensor]:
        step = Step(self.cache, chunks, self.config.window, self._device, masks=self._ahead is None)
        if self._ahead is None:
            x_ND, experts_NLk = forward(self.model, step, return_experts=self.return_experts)
        else:
            self._ahead.kernels.refresh()
            x_ND, experts_NLk = self._ahead.kernels.prefill(step, return_experts=self.return_experts)
        step.commit()
        start = 0
        for request, chunk in zip(requests, chunks, strict=True):
            count = len(chunk.tokens)
            request.fed += count
            if experts_NLk is not None:
                request.routed.append(experts_NLk[start : start + count])
            start += count
        return x_ND, step.last_B

    @property
    def _vocab_size(self) -> int | None:
        return None if self.decoder is None else self.decoder.vocab_size

    def _sample(self, requests: Sequence[Request], logits_BV: torch.Tensor) -> list[Event]:
        params = [request.params for request in requests]
        uniform = [request.uniform.next() if request.params.temperature > 0 else 0.0 for request in requests]
        tokens_B, logprobs_B = sample(
            logits_BV, params, uniform, [request.seen for request in requests], self._vocab_size
        )
        for request, top in zip(requests, most_probable(logits_BV, params, self._vocab_size), strict=True):
            request.completion.top_logprobs.append(top)
        # The one point of a step where the host waits for the device.
        tokens, logprobs = tokens_B.tolist(), logprobs_B.tolist()
        return [self._take(*row) for row in zip(requests, tokens, logprobs, strict=True)]

    def _take(self, request: Request, token: int, logprob: float) -> Event:
        completion = request.completion
        completion.tokens.append(token)
        completion.logprobs.append(logprob)
        if request.seen is not None:
            request.seen[token] = True
        finish: Finish | None = "length" if len(completion.tokens) == request.max_new_tokens else None
        text = ""
        if token in request.params.stop_ids:
            finish = "stop"
        elif request.stream is not None:
            text = request.stream.push(token)
            if request.stream.stopped:
                finish = "stop"
        if finish is not None:
            text += self._finish(request, finish)
        return Event(request, token, logprob, text, completion.finish)

    def _finish(self, request: Request, finish: Finish) -> str:
        """Give the slot back and close the text; returns the rest of it."""
        rest = ""
        completion = request.completion
        completion.finish = finish
        if request.stream is not None:
            rest = request.stream.finish()
            completion.text = request.stream.text
            if request.stream.stopped and finish == "length":
                completion.finish = "stop"
        if self.return_experts and request.routed:
            completion.experts = torch.cat(request.routed).to("cpu", torch.int16).numpy()
            request.routed = []
        for queue in (self._waiting, self._prefilling, self._decoding):
            if request in queue:
                queue.remove(request)
        if request.slot is not None:
            self.cache.release(request.slot)
            self._free_slots.append(request.slot)
            request.slot = None
        return rest


def _slot(request: Request) -> int:
    assert request.slot is not None
    return request.slot


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No gradients, evaluation mode; afterwards the model is in the mode that it was in."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if training:
            model.train()
