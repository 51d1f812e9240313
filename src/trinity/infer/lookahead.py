"""Decoding that does not wait for the device: the next step is under way before the last one's tokens are read.

Steps run as CUDA graphs, one for each batch size that is a power of two, over static buffers; the chosen token of a
step is the next step's input without leaving the device. On a CPU (tests) the same kernels run one by one.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.infer.attention import Step
from trinity.infer.buffers import Buffers
from trinity.infer.cache import Cache
from trinity.infer.kernels import Kernels
from trinity.infer.prefill import prefill


class _Result(NamedTuple):
    """A step on its way to the host."""

    tokens: Tensor
    logprobs: Tensor
    experts_LBk: Tensor | None
    ready: torch.cuda.Event | None


class Lookahead:
    """Steps of one set of rows at a time: `start`, then `launch` and `collect` in turns, at most two launched ahead."""

    def __init__(self, kernels: Kernels, cache: Cache, *, return_experts: bool = False) -> None:
        self.kernels, self.cache = kernels, cache
        self._return_experts = return_experts
        self._graphs: dict[int, tuple[Buffers, torch.cuda.CUDAGraph | None]] = {}
        self._version: int | None = None
        self._slots: list[int] = []
        self._buffers: Buffers | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._results: deque[_Result] = deque()

    @property
    def num_launched(self) -> int:
        """Steps whose tokens were not collected yet."""
        return len(self._results)

    def prefill(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """A chunk of prompts, as `infer.forward.forward`; it may run behind a launched step."""
        self.kernels.refresh()
        return prefill(self.kernels, step, return_experts=self._return_experts)

    def start(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Take over the rows in `slots`, whose next inputs are `tokens`. Nothing may be launched."""
        assert not self._results
        assert len(slots) == len(tokens) > 0
        self._slots = list(slots)
        if self.kernels.refresh():
            self._graphs.clear()
        size = 1 << (len(slots) - 1).bit_length()
        for slot in slots:  # before a graph is captured: growing moves the cache
            self.cache.grow(slot, self.cache.lengths[slot] + 1)
        self._prepare(size)
        b = self._buffers
        assert b is not None
        idle = size - len(slots)
        lengths = [self.cache.lengths[slot] for slot in slots]
        for buffer, values in ((b.tokens, tokens), (b.positions, lengths), (b.slots, slots)):
            filler = -1 if buffer is b.slots else 0
            buffer.copy_(torch.tensor([*values, *[filler] * idle], dtype=buffer.dtype))

    def launch(self) -> None:
        """Feed every row's token; the most probable next one becomes its input. Nothing waits."""
        for slot in self._slots:
            self.cache.grow(slot, self.cache.lengths[slot] + 1)
        assert self._buffers is not None
        if self._version != self.cache.version:  # the cache moved: other addresses
            self._move()
        if self._graph is None:
            self.kernels.decode(self._buffers, self.cache)
        else:
            self._graph.replay()
        for slot in self._slots:
            self.cache.lengths[slot] += 1

    @property
    def logits_BV(self) -> Tensor:
        """Of the rows, in float32, until the next launch."""
        assert self._buffers is not None
        return self._buffers.logits[: len(self._slots)]

    def experts(self, row: int) -> Tensor | None:
        """Chosen experts [1, L, k] of a row of the last launch, on request."""
        assert self._buffers is not None
        return self._buffers.indices[None, :, row].clone() if self._return_experts else None

    def choose(self, tokens_B: Tensor, logprobs_B: Tensor) -> None:
        """Other tokens than the most probable ones become the next inputs."""
        assert self._buffers is not None
        self._buffers.tokens[: len(tokens_B)] = tokens_B
        self._buffers.logprobs[: len(tokens_B)] = logprobs_B

    def send(self) -> None:
        """Start the copy of the last launched step's tokens to the host."""
        b, count = self._buffers, len(self._slots)
        assert b is not None
        experts = b.indices[:, :count].clone() if self._return_experts else None
        tokens, logprobs, event = b.tokens[:count], b.logprobs[:count], None
        if tokens.is_cuda:
            tokens, logprobs = (
                torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
                for x in (tokens, logprobs)
            )
            event = torch.cuda.Event()
            event.record()
        else:
            tokens, logprobs = tokens.clone(), logprobs.clone()
        self._results.append(_Result(tokens, logprobs, experts, event))

    def collect(self) -> tuple[list[int], list[float], Tensor | None]:
        """Tokens and log-probabilities of the oldest step that was sent, and [L, B, k] of chosen experts."""
        result = self._results.popleft()
        if result.ready is not None:
            result.ready.synchronize()
        return result.tokens.tolist(), result.logprobs.tolist(), result.experts_LBk

    def _move(self) -> None:
        """Graphs hold addresses of the cache: make new ones, and keep the rows that are under way."""
        assert self._buffers is not None
        old = self._buffers
        self._prepare(old.batch)
        b = self._buffers
        for name in ("tokens", "positions", "slots"):
            getattr(b, name).copy_(getattr(old, name))

    def _prepare(self, size: int) -> None:
        """Buffers, and on a GPU a captured graph, for `size` rows."""
        if self._version != self.cache.version:
            self._graphs.clear()
            self._version = self.cache.version
        if size not in self._graphs:
            buffers = self.kernels.buffers(size)
            graph = None
            if self.kernels.device.type == "cuda":
                graph = self._capture(buffers)
            self._graphs[size] = (buffers, graph)
        self._buffers, self._graph = self._graphs[size]

    def _capture(self, buffers: Buffers) -> torch.cuda.CUDAGraph:
        """Every row is idle meanwhile, so that nothing is written into the cache."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles the kernels
            self.kernels.decode(buffers, self.cache)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Another thread may train meanwhile (rollouts one step ahead).
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.kernels.decode(buffers, self.cache)
        buffers.positions.zero_()
        return graph
