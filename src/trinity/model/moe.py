"""The mixture of experts: router, routed experts behind a dispatcher, shared expert."""

from typing import Protocol

from torch import Tensor, nn

from trinity.config.model import ModelConfig
from trinity.model.linear import FeedForward, empty_parameter
from trinity.model.norm import Kernels
from trinity.model.router import Documents, LayerStats, Router, routing_stats
from trinity.ops.experts import Order, experts_in_one, grouped_experts, reference_experts, sort_by_expert


class Experts(nn.Module):
    """SwiGLU weights of all routed experts of a layer: gate_up [E, 2F, D] (gate first), down [E, D, F]."""

    def __init__(self, num_experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = empty_parameter(num_experts, 2 * hidden, dim)
        self.down = empty_parameter(num_experts, dim, hidden)
        self.fp8 = False
        """Products in FP8 (`ops/fp8.py`); set by `Transformer.use_fp8`."""

    def forward(
        self, x_RD: Tensor, ends_E: Tensor, order: Order | None = None, weights_Nk: Tensor | None = None
    ) -> Tensor:
        """[R, D] -> [R, D]: expert e on rows ends[e-1] .. ends[e] (int32, cumulative counts); ends[E-1] must be R.

        With `order` and `weights_Nk` tokens [N, D] are given instead, and their weighted sums [N, D] returned.
        """
        if order is not None and weights_Nk is not None:
            return experts_in_one(x_RD, weights_Nk, self.gate_up, self.down, order, fp8=self.fp8)
        return grouped_experts(x_RD, self.gate_up, self.down, ends_E, fp8=self.fp8)


class Dispatcher(Protocol):
    """Brings tokens to their experts and the weighted outputs back; expert parallelism hands in its own."""

    def __call__(
        self, x_ND: Tensor, indices_Nk: Tensor, weights_Nk: Tensor, experts: Experts, shared: nn.Module | None
    ) -> Tensor:
        """y[n] = sum_j weights[n, j] * expert indices[n, j] of x[n] + shared(x[n]), as [N, D] in x's type.

        The shared expert is handed in so that it can be computed while tokens travel.
        """
        ...


def dispatch_local(
    x_ND: Tensor, indices_Nk: Tensor, weights_Nk: Tensor, experts: Experts, shared: nn.Module | None
) -> Tensor:
    """All experts are here: sort the tokens by expert, one grouped product, undo the sort."""
    order = sort_by_expert(indices_Nk, experts.gate_up.shape[0])
    y_ND = experts(x_ND, order.ends_E, order, weights_Nk)
    return y_ND if shared is None else y_ND + shared(x_ND)


def dispatch_reference(
    x_ND: Tensor, indices_Nk: Tensor, weights_Nk: Tensor, experts: Experts, shared: nn.Module | None
) -> Tensor:
    """The plain loop over experts."""
    y_ND = reference_experts(x_ND, indices_Nk, weights_Nk, experts.gate_up, experts.down)
    return y_ND if shared is None else y_ND + shared(x_ND)


class MoE(nn.Module):
    """Routed experts, weighed, plus a shared expert, unscaled."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.router = Router(config, kernels)
        self.experts = Experts(config.num_experts, config.dim, config.expert_dim)
        shared = config.num_shared_experts * config.expert_dim
        self.shared = FeedForward(config.dim, shared, kernels) if shared else None
        self.dispatcher: Dispatcher = dispatch_local if kernels == "fast" else dispatch_reference

    def forward(
        self, x_BTD: Tensor, documents: Documents | None = None, chosen_BTk: Tensor | None = None
    ) -> tuple[Tensor, LayerStats | None]:
        """[B, T, D] -> [B, T, D], and statistics when the documents are given; `chosen_BTk`: see `Router.forward`."""
        x_ND = x_BTD.flatten(0, 1)
        routing = self.router(x_ND) if chosen_BTk is None else self.router(x_ND, chosen_BTk.flatten(0, 1))
        y_ND = self.dispatcher(x_ND, routing.indices_Nk, routing.weights_Nk, self.experts, self.shared)
        stats = None if documents is None else routing_stats(routing, documents)
        return y_ND.view_as(x_BTD), stats
