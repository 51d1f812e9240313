"""`x @ W^T` and its gradients, in the arithmetic that the processor is fastest at.

bfloat16 on a CPU without AMX tiles is slower than float32 (measured on AVX512-BF16: 90 against 160 GFLOP/s a core),
so there the factors are widened, multiplied in float32 and rounded once at the end. The result is at least as exact
as bfloat16 products with float32 sums, which is what every other path computes.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.ops.autograd import once_differentiable


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones (AMX)."""
    return torch.cpu._is_amx_tile_supported()


def widens(x: Tensor) -> bool:
    """Whether matrix products of `x` are computed in float32 although it is bfloat16."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not cpu_has_bfloat16()


def describe_matmul(x: Tensor) -> str:
    """The arithmetic of matrix products of tensors like `x`, for the log of a run."""
    return "bfloat16 widened to float32" if widens(x) else str(x.dtype).removeprefix("torch.")


def linear(x_ND: Tensor, weight_FD: Tensor) -> Tensor:
    """`F.linear` without bias on the fastest arithmetic; any leading dimensions."""
    return _WideLinear.apply(x_ND, weight_FD) if widens(x_ND) else F.linear(x_ND, weight_FD)


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_FD: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_FD)
        return F.linear(x.float(), weight_FD.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        x, weight_FD = ctx.saved_tensors
        dy = d_outputs[0].float()
        dx = (dy @ weight_FD.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = (dy.flatten(0, -2).t() @ x.float().flatten(0, -2)).to(weight_FD.dtype)
        return dx, dw
