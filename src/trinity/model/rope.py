"""Rotary position embedding (Su et al. 2021), half-split: channel i turns with channel i + K/2.

Angles are fp32 and not scaled. Only local layers use it; global layers have no positional encoding.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trinity.ops.autograd import once_differentiable


class Rotation(NamedTuple):
    """cos and sin of the angles of one batch of positions, fp32 [B, T, 1, K/2]; the same for every layer."""

    cos: Tensor
    sin: Tensor


def rotation(positions_BT: Tensor, head_dim: int, theta: float) -> Rotation:
    """Angles positions * theta^(-2i/K), i = 0 .. K/2 - 1."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BT.device) / head_dim
    angles = positions_BT[:, :, None, None].float() * (1.0 / theta**exponents)
    return Rotation(angles.cos(), angles.sin())


def reference_rotate(x_BTHK: Tensor, turn: Rotation) -> Tensor:
    """Turn every pair of channels of every head; computed in fp32, returned in x's type."""
    first, second = x_BTHK.float().chunk(2, dim=-1)
    turned = torch.cat([first * turn.cos - second * turn.sin, second * turn.cos + first * turn.sin], dim=-1)
    return turned.to(x_BTHK.dtype)


def rotate(x_BTHK: Tensor, turn: Rotation) -> Tensor:
    """As the reference; on a CPU the backward pass is the opposite turn, in few passes over memory."""
    if x_BTHK.device.type == "cpu":
        return _CpuRotate.apply(x_BTHK, turn.cos, turn.sin)
    return reference_rotate(x_BTHK, turn)


class _CpuRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x_BTHK, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        cos, sin = ctx.saved_tensors
        return _turn(d_outputs[0], cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    turned_first, turned_second = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned_second).addcmul_(first, sin)
    return turned.to(x.dtype)
