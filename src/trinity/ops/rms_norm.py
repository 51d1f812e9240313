"""RMSNorm: `x * rsqrt(mean(x^2) + eps) * weight`, in fp32 inside, rounded to x's type once.

On CUDA it is one Triton kernel in each direction (compiled: `F.rms_norm`). On a CPU it is a chain of elementwise passes
in each direction, so the backward pass borrows LayerNorm's kernel: with the mean set to 0 that kernel computes
RMSNorm's gradient minus one term, a matrix-vector product, which is added back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.ops import kernels
from trinity.ops.autograd import once_differentiable


def reference_rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x [..., D]. Zhang and Sennrich 2019, equation 4, with eps inside the root."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight_D.float()).to(x.dtype)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The fastest path of x's device; x [..., D] of float32 or bfloat16."""
    if x.device.type == "cpu":
        return _CpuRmsNorm.apply(x, weight_D, eps)
    if kernels.enabled(x):
        from trinity.ops.kernels.norm import norm

        return norm(x, weight_D, eps)
    return F.rms_norm(x, weight_D.shape, weight_D.to(x.dtype), eps)


def residual_norm(
    x: Tensor, y: Tensor, post_D: Tensor, next_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """The seam of a sandwich: (x + rms_norm(y, post), and that normalised by `next_D`, if it is given).

    On CUDA one kernel, which rounds the sum once where the plain chain rounds the normalised y as well.
    """
    if kernels.enabled(x):
        from trinity.ops.kernels import norm as kernel

        return kernel.residual_norm(x, y, post_D, next_D, eps)
    new = x + rms_norm(y, post_D, eps)
    return new, None if next_D is None else rms_norm(new, next_D, eps)


def reference_residual_norm(
    x: Tensor, y: Tensor, post_D: Tensor, next_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """The same by the plain norm."""
    new = x + reference_rms_norm(y, post_D, eps)
    return new, None if next_D is None else reference_rms_norm(new, next_D, eps)


class _CpuRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        ctx.weight_dtype = weight_D.dtype
        return (x * scale).mul_(weight_D.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        x, weight_D, scale = ctx.saved_tensors
        # The kernel sums the weight's gradient in its input's type: bfloat16 would lose it.
        wide, dy, weight_D = x.float().contiguous(), d_outputs[0].float().contiguous(), weight_D.float()
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dx, dw_D, _ = torch.ops.aten.native_layer_norm_backward(
            dy, wide, [x.shape[-1]], torch.zeros_like(scale), scale, weight_D, None, [needs_x, needs_weight, False]
        )
        if needs_x:
            missing = torch.mv(dy.flatten(0, -2), weight_D).view_as(scale).mul_(scale).div_(x.shape[-1])
            dx = dx.add_(missing).to(x.dtype)
        return dx, dw_D.to(ctx.weight_dtype) if needs_weight else None, None
