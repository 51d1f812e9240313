"""The output gate of attention: `x * sigmoid(gate)`."""

import torch
from torch import Tensor

from trinity.ops import kernels
from trinity.ops.autograd import once_differentiable


def reference_gated(x: Tensor, gate: Tensor) -> Tensor:
    """Elementwise, x and gate of one shape."""
    return x * torch.sigmoid(gate)


def reference_gated_heads(o_BTHK: Tensor, gate: Tensor) -> Tensor:
    """o of attention, gate [B, T, H * K] -> o * sigmoid(gate) as [B, T, H * K]."""
    return reference_gated(o_BTHK.flatten(-2), gate)


def gated_heads(o_BTHK: Tensor, gate: Tensor) -> Tensor:
    """As the reference; on CUDA one kernel that reads both in whatever layout they have."""
    if kernels.enabled(o_BTHK):
        from trinity.ops.kernels.heads import GateHeads

        return GateHeads.apply(o_BTHK, gate)
    return gated(o_BTHK.flatten(-2), gate)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """As the reference; on a CPU with fewer passes over memory in the backward direction."""
    return _CpuGated.apply(x, gate) if x.device.type == "cpu" else reference_gated(x, gate)


class _CpuGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor) -> Tensor:
        open_ = torch.sigmoid(gate)
        ctx.save_for_backward(x, open_)
        return open_ * x

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        (d_out,) = d_outputs
        x, open_ = ctx.saved_tensors
        d_gate = torch.ops.aten.sigmoid_backward(d_out * x, open_)
        return open_ * d_out, d_gate
