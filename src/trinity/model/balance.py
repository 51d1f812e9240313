"""Moving the expert biases so that every expert gets its share of tokens, once per optimizer step.

The updates are pure functions over global counts: tokens routed to each expert in one step, summed over
micro-batches and data-parallel ranks. A bias changes which experts are picked, never how much they weigh. Sources:
SMEBU after the Trinity technical report (arXiv 2602.17004); the sign update after Wang et al. 2024
(auxiliary-loss-free balancing), re-centred; quantile balancing after Jianlin Su (kexue.fm/archives/11619), estimated
from histograms as in the Kimi K3 technical report (section 2.3.3 and appendix D).
"""

import torch
from torch import Tensor, nn

from trinity.config import BalanceConfig


def smebu(
    bias_LE: Tensor, momentum_LE: Tensor, counts_LE: Tensor, *, rate: float, kappa: float, beta: float
) -> tuple[Tensor, Tensor]:
    """Soft-clamped momentum expert bias update: new (bias, momentum), each [..., E] float32.

    v = (mean n - n) / mean n;  d = rate * tanh(kappa * v);  d -= mean d;  m = beta m + (1 - beta) d;  b += m.
    A layer that saw no token keeps both.
    """
    violation_LE, seen_L1 = _violation(counts_LE)
    delta_LE = rate * torch.tanh(kappa * violation_LE)
    delta_LE = delta_LE - delta_LE.mean(-1, keepdim=True)
    moved_LE = beta * momentum_LE + (1 - beta) * delta_LE
    momentum = torch.where(seen_L1, moved_LE, momentum_LE)
    return torch.where(seen_L1, bias_LE + momentum, bias_LE), momentum


def sign_update(bias_LE: Tensor, counts_LE: Tensor, *, rate: float, recenter: bool) -> Tensor:
    """b += rate * sign(mean n - n), then (with `recenter`) minus its mean: new bias [..., E] float32."""
    violation_LE, seen_L1 = _violation(counts_LE)
    moved_LE = bias_LE + rate * torch.sign(violation_LE)
    if recenter:
        moved_LE = moved_LE - moved_LE.mean(-1, keepdim=True)
    return torch.where(seen_L1, moved_LE, bias_LE)


MARGIN_BINS = 1000
"""Bins of quantile balancing's histograms (Kimi K3 report, appendix D)."""


def margin_range(bias_E: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds [..., 1] of every margin (see `margin_bins`): a score is in [0, 1], and so is a cutoff less some bias."""
    return bias_E.amin(-1, keepdim=True) - 1, bias_E.amax(-1, keepdim=True) + 1


def margin_bins(scores_NE: Tensor, cutoff_N: Tensor, bias_E: Tensor) -> Tensor:
    """The bin, int64 [N, E], of each margin: cutoff - score, the bias above which the expert gets the token.

    `cutoff_N` is the token's biased score of rank k + 1, `scores_NE` are without bias. MARGIN_BINS bins of one width
    span `margin_range`.
    """
    low_1, high_1 = margin_range(bias_E)
    place_NE = (cutoff_N[:, None] - scores_NE - low_1) * (MARGIN_BINS / (high_1 - low_1))
    return place_NE.long().clamp(0, MARGIN_BINS - 1)


def quantile_update(bias_LE: Tensor, counts_LE: Tensor, margins_LEB: Tensor) -> Tensor:
    """The bias with which each expert alone would have had its share of tokens: new bias [..., E] float32, mean zero.

    That is the k / E quantile of its margins, read off their histogram (int64 [..., E, B], made with `bias_LE`) with
    margins spread evenly inside a bin. k / E of the tokens is the mean of the counts. A layer that saw no token keeps
    its bias.
    """
    low_L1, high_L1 = margin_range(bias_LE)
    target_L1 = counts_LE.double().mean(-1, keepdim=True)
    until_LEB = margins_LEB.cumsum(-1)
    bin_LE = (until_LEB < target_L1[..., None]).sum(-1).clamp(max=margins_LEB.shape[-1] - 1)
    inside_LE = margins_LEB.gather(-1, bin_LE[..., None])[..., 0]
    before_LE = until_LEB.gather(-1, bin_LE[..., None])[..., 0] - inside_LE
    place_LE = bin_LE + (target_L1 - before_LE) / inside_LE.clamp(min=1)
    wanted_LE = low_L1 + place_LE * ((high_L1 - low_L1) / margins_LEB.shape[-1])
    wanted_LE = (wanted_LE - wanted_LE.mean(-1, keepdim=True)).float()
    return torch.where(target_L1 > 0, wanted_LE, bias_LE)


def needs_margins(settings: BalanceConfig) -> bool:
    """Whether `apply_balance` needs histograms of margins, which routers make only when told to."""
    return settings.kind == "quantile" and not settings.frozen


def max_vio(counts_LE: Tensor) -> Tensor:
    """max n / mean n - 1 of each layer [...]: 0 is perfect balance (or no token), E - 1 is all on one expert."""
    violation_LE, _ = _violation(counts_LE)
    return (-violation_LE).amax(-1)


def _violation(counts_LE: Tensor) -> tuple[Tensor, Tensor]:
    """(mean n - n) / mean n in float32, zero where a layer saw nothing, and whether it saw something [..., 1]."""
    counts_LE = counts_LE.double()
    mean_L1 = counts_LE.mean(-1, keepdim=True)
    seen_L1 = mean_L1 > 0
    return ((mean_L1 - counts_LE) / mean_L1.clamp_min(1e-30)).where(seen_L1, 0.0).float(), seen_L1


@torch.no_grad()
def apply_balance(
    model: nn.Module,
    counts_LE: Tensor,
    settings: BalanceConfig,
    *,
    margins_LEB: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """Move the biases of every MoE layer in place; `counts_LE` are the step's global counts, layers in order.

    `margins_LEB` are the step's global histograms of margins, for quantile balancing (`needs_margins`).
    `skip` (scalar on the device, non-zero means skip) leaves every bias and momentum as it is, without a host sync.
    """
    if settings.kind == "none" or settings.frozen:
        return
    buffers = dict(model.named_buffers())
    names = [name.removesuffix("bias") for name in buffers if name.endswith("moe.router.bias")]
    assert len(names) == len(counts_LE), f"{len(names)} MoE layers, counts of {len(counts_LE)}"
    bias_LE = torch.stack([buffers[name + "bias"] for name in names])
    momentum_LE = torch.stack([buffers[name + "momentum"] for name in names])
    assert bias_LE.dtype == momentum_LE.dtype == torch.float32, "expert biases lost their float32 type"
    if settings.kind == "smebu":
        new_bias, new_momentum = smebu(
            bias_LE, momentum_LE, counts_LE, rate=settings.rate, kappa=settings.kappa, beta=settings.momentum
        )
    elif settings.kind == "quantile":
        assert margins_LEB is not None, "quantile balancing without margins: routers were not told to record them"
        new_bias, new_momentum = quantile_update(bias_LE, counts_LE, margins_LEB), momentum_LE
    else:
        new_bias = sign_update(bias_LE, counts_LE, rate=settings.rate, recenter=settings.recenter)
        new_momentum = momentum_LE
    if skip is not None:
        new_bias = torch.where(skip != 0, bias_LE, new_bias)
        new_momentum = torch.where(skip != 0, momentum_LE, new_momentum)
    for i, name in enumerate(names):
        buffers[name + "bias"].copy_(new_bias[i])
        buffers[name + "momentum"].copy_(new_momentum[i])
