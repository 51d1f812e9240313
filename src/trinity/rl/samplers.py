"""The native engine as the sampler of rollouts: on the weights being trained, or on a copy for another thread."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from trinity.config import RLConfig
from trinity.infer.engine import Engine
from trinity.infer.sampling import SamplingParams
from trinity.model.transformer import Transformer
from trinity.rl.sample import Sampled
from trinity.tokenizer import Tokenizer


class LiveSampler:
    """Samples from the model that is being trained, without a copy of its weights.

    One engine serves the run: on a GPU it keeps its cache and what it recorded. `gathered` makes all weights of a
    sharded model available.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        settings: RLConfig,
        gathered: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._model, self._tokenizer, self._settings, self._gathered = model, tokenizer, settings, gathered
        self._engine: Engine | None = None

    def sync(self) -> None:
        """Nothing to do: the weights are the trainer's."""

    def __call__(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sampled]:
        settings, stops = self._settings, tuple(self._tokenizer.stop_ids)
        params = [
            SamplingParams(
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seed=seed,
                stop_ids=stops,
                tempered_logprobs=True,
            )
            for seed in seeds
        ]
        with self._gathered():
            done = self._open().generate(prompts, params)
        return [Sampled(c.text, c.tokens, c.logprobs, c.finish == "stop", c.experts) for c in done]

    def _open(self) -> Engine:
        if self._engine is None:
            batch = min(self._settings.sampler_batch, self._settings.prompts_per_step * self._settings.group)
            self._engine = Engine(
                self._model,
                self._tokenizer,
                max_batch=batch,
                max_tokens=batch * self._settings.seq_len,
                return_experts=self._settings.replay or self._settings.gap_every > 0,
            )
        return self._engine


class CopySampler(LiveSampler):
    """Samples from a copy of the weights, made by `sync`; on a GPU on a stream of its own, beside the training."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, settings: RLConfig) -> None:
        with torch.device("meta"):
            copy = Transformer(model.config, kernels=model.kernels)
        super().__init__(copy, tokenizer, settings)
        self._source, self._empty = model, True
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def sync(self) -> None:
        """Copy the weights as they are after the work that this thread's stream was given so far."""
        live = self._source.state_dict()
        if self._empty:
            self._model.load_state_dict({name: t.detach().clone() for name, t in live.items()}, assign=True)
            self._model.requires_grad_(False).eval()
            self._empty = False
        else:
            own = self._model.state_dict()
            torch._foreach_copy_(list(own.values()), [live[name] for name in own])
        device = self._model.embed.weight.device
        if device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(device)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def __call__(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sampled]:
        if self._stream is None:
            return super().__call__(prompts, seeds)
        with torch.cuda.stream(self._stream):
            if self._copied is not None:
                self._stream.wait_event(self._copied)
            found = super().__call__(prompts, seeds)
            self._stream.synchronize()  # the copy may be overwritten from here on
        return found
