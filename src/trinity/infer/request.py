"""One request: what was asked, how far it is, and the completion that grows out of it."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from trinity.infer.sampling import SamplingParams, TokenStream
from trinity.infer.text import Decoder, TextStream

Finish = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass
class Completion:
    """What one request generated."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    """New tokens; the stop token, if one came, is the last."""
    logprobs: list[float] = dataclasses.field(default_factory=list)
    """Of each token, log_softmax of the model's logits as they are: nothing truncated, at temperature 1 unless
    `SamplingParams.tempered_logprobs`."""
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
        self.keep = False
        """Whether its part of the cache stays when it is finished, for requests that go on from there."""
        self.branch: Request | None = None
        """A kept request of whose cached tokens it takes a copy when it is admitted."""
        self.fed = 0
        """Tokens that the cache holds."""
        self.uniform = TokenStream(params.seed)
        self.stream = TextStream(decoder, params.stop) if decoder is not None else None
        self.seen: torch.Tensor | None = None
        """bool [V] of tokens in the prompt and the answer, where a repetition penalty needs it."""
        self.routed: list[torch.Tensor] = []
        """Chosen experts [tokens, L, k] of what was fed, where they are wanted."""

    @property
    def done(self) -> bool:
        return self.completion.finish is not None

    @property
    def longest(self) -> int:
        """Tokens that prompt and answer may come to."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def cached(self) -> list[int]:
        """The tokens that the cache holds."""
        return (self.prompt + self.completion.tokens)[: self.fed]

    def continues(self, before: "Request") -> bool:
        """Whether the prompt begins with what a kept request has cached, and goes on: at least one token must be fed to
        know what comes next."""
        cached = before.cached
        return before.slot is not None and len(self.prompt) > len(cached) and self.prompt[: len(cached)] == cached

    @property
    def num_read(self) -> int:
        """Tokens of the prompt that are in the cache."""
        return min(self.fed, len(self.prompt))

    @property
    def held_slot(self) -> int:
        """The slot of a request that was admitted."""
        assert self.slot is not None
        return self.slot

    def feed(self, count: int, experts_NLk: torch.Tensor | None) -> None:
        """`count` more tokens lie in the cache."""
        self.fed += count
        if experts_NLk is not None:
            self.routed.append(experts_NLk)

    def take(self, token: int, logprob: float, top: list[tuple[int, float]]) -> tuple[str, Finish | None]:
        """Add a token to the completion: the text that became certain with it, and whether it is the last one."""
        completion = self.completion
        completion.tokens.append(token)
        completion.logprobs.append(logprob)
        completion.top_logprobs.append(top)
        if self.seen is not None:
            self.seen[token] = True
        finish: Finish | None = "length" if len(completion.tokens) == self.max_new_tokens else None
        text = ""
        if token in self.params.stop_ids:
            finish = "stop"
        elif self.stream is not None:
            text = self.stream.push(token)
            if self.stream.stopped:
                finish = "stop"
        return text, finish

    def close(self, finish: Finish) -> str:
        """End the completion; returns the rest of its text."""
        rest = ""
        completion = self.completion
        completion.finish = finish
        if self.stream is not None:
            rest = self.stream.finish()
            completion.text = self.stream.text
            if self.stream.stopped and finish == "length":
                completion.finish = "stop"
        if self.routed:
            completion.experts = torch.cat(self.routed).to("cpu", torch.int16).numpy()
            self.routed = []
        return rest


@dataclasses.dataclass(frozen=True)
class Event:
    """One new token of one request. `text` is what became certain with it, which may be nothing."""

    request: Request
    token: int
    logprob: float
    text: str
    finish: Finish | None
