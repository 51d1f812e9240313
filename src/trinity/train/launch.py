"""Forward and backward of one micro-batch: launched operation by operation, or replayed as one CUDA graph.

A step of a model with small experts is thousands of short kernels, and starting them one by one takes the host longer
than the GPU needs to run them. A graph is recorded once per shape of micro-batch and then started whole. It holds
addresses, not values: inputs are copied into its own tensors, gradients are added into buffers that stay where they
are, and its outputs are overwritten by the next replay, on the same stream.

Only losses that decide nothing on the host may be recorded (`CAPTURABLE`), on one rank and a CUDA device.
"""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from trinity.config import LossConfig
from trinity.config.run import RuntimeConfig
from trinity.train.losses import Batch, LossFunction, LossOutput, Share, language_model_loss

CAPTURABLE: frozenset[LossFunction] = frozenset({language_model_loss})
"""Losses whose Python code depends on shapes alone."""
RECORDED, LAUNCHED = "one CUDA graph", "operations launched one by one"
WARM_UP = 2
"""Micro-batches of a shape that are launched before the third is recorded: kernels compile and tune themselves then."""
MAX_GRAPHS = 2
"""Shapes that are recorded; micro-batches of further shapes are launched. Graphs share their memory."""


def is_recorded(
    runtime: RuntimeConfig, device: torch.device, loss: LossFunction, settings: LossConfig, *, alone: bool
) -> bool:
    """Whether micro-batches are recorded; `alone`: one rank, with all weights. Libraries' losses read numbers on the
    host."""
    capturable = loss in CAPTURABLE and settings.cross_entropy == "chunked"
    return runtime.cuda_graphs and device.type == "cuda" and alone and capturable


class Launched:
    """Each operation is started by the host."""

    def __init__(self, model: nn.Module, loss: LossFunction, settings: LossConfig) -> None:
        self.model, self.loss, self.settings = model, loss, settings

    def begin(self, optimizer_zero_grad: Callable[[], None]) -> None:
        """Gradients at zero, at the start of a step."""
        optimizer_zero_grad()

    def run(self, batch: Batch, share: Share) -> LossOutput:
        """Add the micro-batch's gradients to the parameters' and return its (detached) numbers."""
        output = self.loss(self.model, batch, share, self.settings)
        output.loss.backward()
        return detached(output)

    def describe(self) -> str:
        return LAUNCHED


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    batch: Batch
    share: Share
    output: LossOutput


class Graphed(Launched):
    """The same, recorded. `parameters` are those whose `.grad` a micro-batch adds to: masters where there are any."""

    def __init__(
        self, model: nn.Module, loss: LossFunction, settings: LossConfig, parameters: Iterable[nn.Parameter | Tensor]
    ) -> None:
        super().__init__(model, loss, settings)
        assert loss in CAPTURABLE, f"{loss} is not known to be free of decisions on the host"
        self._parameters = [p for p in parameters if p.requires_grad]
        self._gradients: list[Tensor] | None = None
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        self._seen: dict[tuple, int] = {}
        self._recorded: dict[tuple, _Recorded] = {}

    def begin(self, optimizer_zero_grad: Callable[[], None]) -> None:
        """Gradients at zero in buffers that keep their addresses."""
        if self._gradients is None:
            optimizer_zero_grad()
            self._gradients = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in self._parameters]
        else:
            torch._foreach_zero_(self._gradients)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def run(self, batch: Batch, share: Share) -> LossOutput:
        key = tuple((name, tuple(t.shape), t.dtype) for name, t in _tensors(batch).items())
        if key in self._recorded:
            return self._replay(self._recorded[key], batch, share)
        # Everything that autograd makes for a parameter belongs to the stream on which it was made, so the launched
        # micro-batches run where the recorded one will.
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] <= WARM_UP or len(self._recorded) == MAX_GRAPHS:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                output = super().run(batch, share)
            torch.cuda.current_stream().wait_stream(self._stream)
            return output
        recorded = self._record(batch, share)
        self._recorded[key] = recorded
        return self._replay(recorded, batch, share)

    def describe(self) -> str:
        return RECORDED

    def _record(self, batch: Batch, share: Share) -> _Recorded:
        batch = _rebuilt(batch, {name: t.clone() for name, t in _tensors(batch).items()})
        share = Share(share.targets.clone(), share.tokens.clone())
        gc.collect()  # a cycle that dies during the recording would free memory that the graph uses
        graph = torch.cuda.CUDAGraph()
        # Other threads (loader, checkpoint writer) may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = super().run(batch, share)
        return _Recorded(graph, batch, share, output)

    @staticmethod
    def _replay(recorded: _Recorded, batch: Batch, share: Share) -> LossOutput:
        mine = _tensors(batch)
        for name, static in _tensors(recorded.batch).items():
            static.copy_(mine[name])
        recorded.share.targets.copy_(share.targets)
        recorded.share.tokens.copy_(share.tokens)
        recorded.graph.replay()
        return _cloned(recorded.output)


def detached(output: LossOutput) -> LossOutput:
    """Without what the backward pass needs."""
    return replace(
        output,
        loss=output.loss.detach(),
        terms={name: t.detach() for name, t in output.terms.items()},
        mean=output.mean.detach(),
        extremes={name: t.detach() for name, t in output.extremes.items()},
    )


def _cloned(output: LossOutput) -> LossOutput:
    """Tensors that the next replay leaves alone."""
    return LossOutput(
        loss=output.loss.clone(),
        terms={name: t.clone() for name, t in output.terms.items()},
        mean=output.mean.clone(),
        counts_LE=output.counts_LE.clone(),
        extremes={name: t.clone() for name, t in output.extremes.items()},
        margins_LEB=None if output.margins_LEB is None else output.margins_LEB.clone(),
    )


def _tensors(batch: Batch) -> dict[str, Tensor]:
    base = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "extra"}
    return base | {f"extra.{name}": tensor for name, tensor in batch.extra.items()}


def _rebuilt(batch: Batch, tensors: dict[str, Tensor]) -> Batch:
    extra = {name: tensors.pop(f"extra.{name}") for name in batch.extra}
    return Batch(**tensors, extra=extra)
