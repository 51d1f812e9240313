"""Batched generation with continuous admission, on the weights of the model that is handed in.

`schedule` says who runs, `request` keeps what came of it; here the steps run. What a request samples depends on its
prompt, its parameters and its seed alone, up to the rounding of sums in batches of another shape.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from trinity.base.errors import UserError
from trinity.infer.attention import Chunk, Step
from trinity.infer.cache import Cache
from trinity.infer.forward import forward
from trinity.infer.paths import Path, use_kernels
from trinity.infer.request import Completion, Event, Finish, Request
from trinity.infer.sampling import SamplingParams, most_probable, sample
from trinity.infer.schedule import Schedule
from trinity.infer.text import Decoder
from trinity.model.transformer import Transformer

if TYPE_CHECKING:
    from trinity.infer.lookahead import Lookahead


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
        self._schedule = Schedule(max_batch, max_tokens or max_batch * self.config.max_positions, prefill_chunk)
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

    def describe(self) -> str:
        """The path of the forward pass in a few words, for a log."""
        return "reference" if self._ahead is None else self._ahead.kernels.describe()

    @property
    def num_running(self) -> int:
        return len(self._schedule.prefilling) + len(self._schedule.decoding)

    @property
    def num_waiting(self) -> int:
        return len(self._schedule.waiting)

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        keep: bool = False,
        follow: Request | None = None,
        branch: Request | None = None,
    ) -> Request:
        """Queue a prompt. Raises UserError when it is empty, has a token outside the vocabulary or cannot fit.

        keep: its slot and what is cached in it stay when it is finished, until `release`. follow: a finished request
        that was kept; where the prompt begins with what it has cached, only the rest is read, else it is released.
        branch: the same, but of a copy of what is cached: any number of requests may branch from one, which stays kept.
        """
        assert not self.return_experts or (follow is None and branch is None), (
            "the experts of tokens that are not read again are not known"
        )
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
        if request.longest > self._schedule.max_tokens:
            raise UserError(
                f"prompt and answer may come to {request.longest} tokens, but the engine holds "
                f"{self._schedule.max_tokens}; ask for fewer new tokens or raise max_tokens"
            )
        if params.repetition_penalty != 1.0:
            request.seen = torch.zeros(self.config.vocab_size, dtype=torch.bool, device=self._device)
            request.seen[torch.tensor(request.prompt, device=self._device)] = True
        request.keep, request.branch = keep, branch
        if follow is None or not self._follow(follow, request):
            self._schedule.waiting.append(request)
        return request

    def release(self, request: Request) -> None:
        """Give up what was kept of a finished request."""
        assert request.done
        slot = self._schedule.free(request)
        if slot is not None:
            self.cache.release(slot)

    def _follow(self, before: Request, request: Request) -> bool:
        assert before.done
        slot = before.slot
        if slot is not None and self._schedule.follow(before, request):
            # A step that ran ahead may have cached a token more.
            self.cache.lengths[slot] = request.fed
            return True
        self.release(before)
        return False

    def read(self, tokens: Sequence[int]) -> Request:
        """Read a text at once, for requests that begin with it (`branch`); what is cached stays until `release`.

        Raises UserError as `submit` and `step`.
        """
        request = self.submit(tokens, SamplingParams(max_new_tokens=1, temperature=0.0), keep=True)
        try:
            with _evaluating(self.model):
                while not request.done:
                    self.step()
        except BaseException:
            self.cancel(request)
            self.release(request)
            raise
        return request

    def _copy(self, request: Request) -> None:
        """Give an admitted request what the one that it branches from has cached, where its prompt begins so."""
        before, request.branch = request.branch, None
        if before is None or not before.done or not request.continues(before):
            return
        # A step that ran ahead may have cached a token more.
        self.cache.lengths[before.held_slot] = before.fed
        self.cache.copy(before.held_slot, request.held_slot)
        request.fed = before.fed

    def cancel(self, request: Request) -> None:
        """Stop a request wherever it is; what it generated so far stays in its completion."""
        if not request.done:
            self._finish(request, "cancelled")

    def step(self) -> list[Event]:
        """Admit what fits, run one forward pass, and return the tokens it gave: none while prompts are being read.

        Raises UserError when nothing can ever be admitted because of requests that are kept.
        """
        with _evaluating(self.model):
            for request in self._schedule.admit():
                self._copy(request)
            if self._schedule.prefills_next():
                return self._prefill()
            if self._schedule.decoding:
                return self._decode()
            if self._schedule.waiting:  # with nothing under way the first in line always fits, but for what is kept
                raise UserError("finished requests that are kept hold all room; release one of them")
            return []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        on_token: Callable[[int, Event], None] | None = None,
        on_prompt: Callable[[int, int], None] | None = None,
        branch: Request | None = None,
    ) -> list[Completion]:
        """Completions in the order of `prompts`; `on_token` gets the number of the prompt and each event, `on_prompt`
        how many tokens of all prompts are read and how many there are. `branch` is that of `submit`, for all prompts.

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
                requests.append(self.submit(prompt, own, branch=branch))
            numbers = {id(request): i for i, request in enumerate(requests)}
            with _evaluating(self.model):
                if on_prompt is not None:
                    on_prompt(0, sum(len(r.prompt) for r in requests))
                while not all(request.done for request in requests):
                    events = self.step()
                    if on_prompt is not None and self._schedule.prefilled_last:
                        on_prompt(sum(request.num_read for request in requests), sum(len(r.prompt) for r in requests))
                    for event in events:
                        if on_token is not None and id(event.request) in numbers:
                            on_token(numbers[id(event.request)], event)
        finally:  # nothing to cancel but when an error or the caller interrupted
            for request in requests:
                self.cancel(request)
        return [request.completion for request in requests]

    def _prefill(self) -> list[Event]:
        requests, chunks = self._schedule.chunks()
        x_ND, last_B = self._forward(requests, chunks)
        ready = [i for i, request in enumerate(requests) if request.fed == len(request.prompt)]
        if not ready:
            return []
        finished = [requests[i] for i in ready]
        self._schedule.promote(finished)
        return self._sample(finished, self.model.head(x_ND[last_B[ready]]))

    def _decode(self) -> list[Event]:
        if self._ahead is not None:
            return self._decode_ahead(self._ahead)
        requests = list(self._schedule.decoding)
        chunks = [Chunk(request.held_slot, request.completion.tokens[-1:]) for request in requests]
        x_ND, last_B = self._forward(requests, chunks)
        return self._sample(requests, self.model.head(x_ND[last_B]))

    def _decode_ahead(self, ahead: "Lookahead") -> list[Event]:
        """The tokens of the oldest step under way, while the device is busy with the next one.

        The next step is launched before that only when it is certain to be wanted: the same requests, none of which
        ends by its length. Where the host must know a token before another is chosen, or reports on its rivals, nothing
        runs ahead.
        """
        decoding = self._schedule.decoding
        if not ahead.num_launched:
            self._rows = list(decoding)
            ahead.start([r.held_slot for r in self._rows], [r.completion.tokens[-1] for r in self._rows])
            if any(request.seen is not None or request.params.top_logprobs for request in self._rows):
                ahead.launch()
                for i, request in enumerate(self._rows):
                    request.feed(1, ahead.experts(i))
                return self._sample(self._rows, ahead.logits_BV)
            self._launch(ahead)
        rows = self._rows
        if rows == decoding and all(len(r.completion.tokens) + 1 < r.max_new_tokens for r in rows):
            self._launch(ahead)
        tokens, logprobs, experts_LBk = ahead.collect()
        events = []
        for i, request in enumerate(rows):
            if not request.done:  # else: stopped or cancelled while this step was under way
                request.feed(1, None if experts_LBk is None else experts_LBk[None, :, i])
                events.append(self._take(request, tokens[i], logprobs[i], []))
        return events

    def _launch(self, ahead: "Lookahead") -> None:
        ahead.launch()
        params = [request.params for request in self._rows]
        if any(p.temperature > 0 for p in params):
            uniform = [request.uniform.next() if request.params.temperature > 0 else 0.0 for request in self._rows]
            ahead.choose(*sample(ahead.logits_BV, params, uniform, [None] * len(params), self._vocab_size))
        ahead.send()

    def _forward(self, requests: Sequence[Request], chunks: Sequence[Chunk]) -> tuple[torch.Tensor, torch.Tensor]:
        step = Step(self.cache, chunks, self.config.window, self._device, masks=self._ahead is None)
        if self._ahead is None:
            x_ND, experts_NLk = forward(self.model, step, return_experts=self.return_experts)
        else:
            x_ND, experts_NLk = self._ahead.prefill(step)
        step.commit()
        start = 0
        for request, chunk in zip(requests, chunks, strict=True):
            count = len(chunk.tokens)
            request.feed(count, None if experts_NLk is None else experts_NLk[start : start + count])
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
        tops = most_probable(logits_BV, params, self._vocab_size)
        # The one point of a step where the host waits for the device.
        tokens, logprobs = tokens_B.tolist(), logprobs_B.tolist()
        return [self._take(*row) for row in zip(requests, tokens, logprobs, tops, strict=True)]

    def _take(self, request: Request, token: int, logprob: float, top: list[tuple[int, float]]) -> Event:
        text, finish = request.take(token, logprob, top)
        if finish is not None:
            text += self._finish(request, finish)
        return Event(request, token, logprob, text, request.completion.finish)

    def _finish(self, request: Request, finish: Finish) -> str:
        """Give the slot back and close the text; returns the rest of it."""
        slot = self._schedule.drop(request)
        if slot is not None:
            self.cache.release(slot)
        return request.close(finish)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No gradients, evaluation mode; afterwards the model is in the mode that it was in.

    Kernels start on the current GPU, which is a thread's own: it is that of the model meanwhile.
    """
    training = model.training
    device = next(model.parameters()).device
    if training:
        model.eval()
    try:
        with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    finally:
        if training:
            model.train()
