"""The router: sigmoid scores, a bias that only selects, and what is measured about it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trinity.config.model import ModelConfig
from trinity.model.balance import MARGIN_BINS, margin_bins
from trinity.model.linear import empty_parameter
from trinity.model.norm import Kernels
from trinity.ops import kernels as triton_kernels
from trinity.ops.exact_linear import exact_linear, reference_exact_linear


class Routing(NamedTuple):
    """Where the tokens of one layer go."""

    indices_Nk: Tensor
    """int64: selected experts, by falling biased score."""
    weights_Nk: Tensor
    """fp32: factors on the outputs of the selected experts."""
    scores_NE: Tensor | None
    """fp32: sigmoid of the logits, without bias; None where the kernels that need them compute them again."""
    logits_NE: Tensor
    """fp32"""
    bins_NE: Tensor | None = None
    """int64: bin of each margin (`balance.margin_bins`), where they are recorded."""


class LayerStats(NamedTuple):
    """What one layer's routing did to the tokens that are not padding; all but `sequence_loss` are detached."""

    counts_E: Tensor
    """int64: tokens of each expert."""
    sequence_loss: Tensor
    logit_min: Tensor
    logit_max: Tensor
    entropy: Tensor
    """Mean over tokens of the entropy of scores / sum(scores), in nats."""
    margins_EB: Tensor | None = None
    """int64: histogram of each expert's margins over the tokens, where they are recorded."""


class Documents(NamedTuple):
    """Which tokens belong together in the sequence-wise loss."""

    document_N: Tensor
    """int64: number of the document in the batch, from 0."""
    num_documents: int
    """An upper bound of the numbers."""
    real_N: Tensor | None
    """bool: not padding; None when nothing is."""
    complete: Callable[[Tensor], Tensor] | None = None
    """Where rows are split over ranks: adds to the counts of the documents here (int64 [num_documents, E]) what other
    ranks counted in their parts of them; without gradient."""


class Router(nn.Module):
    """Scores every expert for every token and selects k.

    `bias` and `momentum` are buffers of the balancing and stay fp32 whatever type the model is moved to: one step of
    the bias is smaller than bfloat16 resolves.
    """

    bias: Tensor
    momentum: Tensor

    def __init__(self, config: ModelConfig, kernels: Kernels = "fast") -> None:
        super().__init__()
        self.kernels: Kernels = kernels
        self.experts_per_token = config.experts_per_token
        self.route_norm, self.route_scale = config.route_norm, config.route_scale
        self.records_margins = False
        """For quantile balancing, in forward passes with gradients."""
        self.weight = empty_parameter(config.num_experts, config.dim)
        self.register_buffer("bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self.register_buffer("momentum", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, x_ND: Tensor, chosen_Nk: Tensor | None = None) -> Routing:
        """The product is exact to fp32 for the same reason as the bias is: rounded logits would tie.

        `chosen_Nk` (int64) replaces the selection, as replay needs it; a row that begins with -1 selects for itself.
        The factors are those of the scores here, with their gradient.
        """
        if self.kernels == "reference":
            logits_NE = reference_exact_linear(x_ND, self.weight)
        else:
            logits_NE = exact_linear(x_ND, self.weight)
            own = chosen_Nk is None and not (self.records_margins and torch.is_grad_enabled())
            if own and triton_kernels.enabled(x_ND):
                from trinity.ops.kernels.routing import Select

                k = self.experts_per_token
                indices_Nk, weights_Nk = Select.apply(logits_NE, self.bias, k, self.route_norm, self.route_scale)
                return Routing(indices_Nk, weights_Nk, None, logits_NE)
        scores_NE = logits_NE.sigmoid()
        biased_NE = scores_NE.detach() + self.bias
        bins_NE = None
        if self.records_margins and torch.is_grad_enabled():
            top = biased_NE.topk(self.experts_per_token + 1, dim=-1)
            indices_Nk = top.indices[:, :-1].contiguous()
            bins_NE = margin_bins(scores_NE.detach(), top.values[:, -1], self.bias)
        else:
            indices_Nk = biased_NE.topk(self.experts_per_token, dim=-1).indices
        if chosen_Nk is not None:
            indices_Nk = torch.where(chosen_Nk[:, :1] >= 0, chosen_Nk, indices_Nk)
        weights_Nk = scores_NE.gather(1, indices_Nk)
        if self.route_norm:
            weights_Nk = weights_Nk / (weights_Nk.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(indices_Nk, weights_Nk * self.route_scale, scores_NE, logits_NE, bins_NE)

    def _apply(self, fn, recurse=True):
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != torch.float32:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name, buffer in self._buffers.items():
            assert buffer is not None
            self._buffers[name] = buffer.float()


def routing_stats(routing: Routing, documents: Documents) -> LayerStats:
    """Counts, sequence-wise loss and health of one layer; no host synchronisation.

    The loss of a document of T tokens is sum_i f_i P_i with f_i = E / (k T) * (times expert i was selected) and P_i
    the mean of p_i = s_i / sum_j s_j (1 when balanced). Documents are weighed by their tokens. With
    load_i = times / T, that is E / k * the mean over all tokens of sum_i load_i(the token's document) * p_i, which
    needs no loop over documents.
    """
    indices_Nk, _, scores_NE, logits_NE, bins_NE = routing
    document_N, num_documents, real_N, complete = documents
    if scores_NE is None and complete is None and bins_NE is None:
        from trinity.ops.kernels.routing import Balance

        return LayerStats(*Balance.apply(logits_NE, indices_Nk, document_N, num_documents, real_N))
    scores_NE = logits_NE.sigmoid() if scores_NE is None else scores_NE
    num_experts, experts_per_token = logits_NE.shape[1], indices_Nk.shape[1]
    with torch.no_grad():
        ones_N = torch.ones_like(document_N) if real_N is None else real_N.long()
        ones_Nk = ones_N[:, None].expand_as(indices_Nk)
        cell_Nk = document_N[:, None] * num_experts + indices_Nk
        times = document_N.new_zeros(num_documents * num_experts).scatter_add_(0, cell_Nk.flatten(), ones_Nk.flatten())
        times_ME = times.view(num_documents, num_experts)
        counts_E = times_ME.sum(dim=0)
        if complete is not None:
            times_ME = complete(times_ME)
        load_ME = times_ME * experts_per_token / times_ME.sum(dim=1, keepdim=True).clamp(min=1)
        real_tokens = ones_N.sum().clamp(min=1)
        load_NE = load_ME.index_select(0, document_N) * ones_N[:, None]
    share_NE = scores_NE / scores_NE.sum(dim=-1, keepdim=True)
    sequence_loss = (share_NE * load_NE).sum() * (num_experts / experts_per_token) / real_tokens
    with torch.no_grad():
        entropy_N = -(share_NE * (share_NE + 1e-20).log()).sum(dim=-1)
        logits_NE = logits_NE.detach()
        if real_N is None:
            low, high, entropy = logits_NE.min(), logits_NE.max(), entropy_N.mean()
        else:
            low = logits_NE.masked_fill(~real_N[:, None], float("inf")).min()
            high = logits_NE.masked_fill(~real_N[:, None], float("-inf")).max()
            entropy = (entropy_N * ones_N).sum() / real_tokens
        margins_EB = None if bins_NE is None else _histogram(bins_NE, ones_N)
    return LayerStats(counts_E, sequence_loss, low, high, entropy, margins_EB)


def _histogram(bins_NE: Tensor, ones_N: Tensor) -> Tensor:
    """How often each bin occurs in each column: int64 [E, MARGIN_BINS]; rows count `ones_N` times."""
    num_experts = bins_NE.shape[1]
    cell_NE = bins_NE + torch.arange(num_experts, device=bins_NE.device) * MARGIN_BINS
    counts = bins_NE.new_zeros(num_experts * MARGIN_BINS)
    counts.scatter_add_(0, cell_NE.flatten(), ones_N[:, None].expand_as(cell_NE).flatten())
    return counts.view(num_experts, MARGIN_BINS)
