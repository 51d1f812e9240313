"""Moving the expert biases so that every expert gets its share of tokens, once per optimizer step.

The updates are pure functions over global counts: tokens routed to each expert in one step, summed over
micro-batches and data-parallel ranks. A bias changes which experts are picked, never how much they weigh. Sources:
SMEBU after the Trinity technical report (arXiv 2602.17004); the sign update after Wang et al. 2024
(auxiliary-loss-free balancing), re-centred.
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
def apply_balance(model: nn.Module, counts_LE: Tensor, settings: BalanceConfig, *, skip: Tensor | None = None) -> None:
    """Move the biases of every MoE layer in place; `counts_LE` are the step's global counts, layers in order.

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
    else:
        new_bias = sign_update(bias_LE, counts_LE, rate=settings.rate, recenter=settings.recenter)
        new_momentum = momentum_LE
    if skip is not None:
        new_bias = torch.where(skip != 0, bias_LE, new_bias)
        new_momentum = torch.where(skip != 0, momentum_LE, new_momentum)
    for i, name in enumerate(names):
        buffers[name + "bias"].copy_(new_bias[i])
        buffers[name + "momentum"].copy_(new_momentum[i])
