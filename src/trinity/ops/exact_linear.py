"""The router's product: bfloat16 tokens times a float32 matrix, exact to float32.

Tensor cores multiply bfloat16 and add in float32. A bfloat16 token needs no rounding, and a float32 weight is the sum
of three bfloat16 numbers (8 bits each), so one product with the three stacked and a sum of three give float32's result
several times faster than a float32 product. In the backward pass the gradient is split alike, in two (16 bits): it is
rounded to bfloat16 for the tokens anyway.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.ops import kernels
from trinity.ops.autograd import once_differentiable


def reference_exact_linear(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """x @ weight^T in fp32."""
    return F.linear(x_ND.float(), weight_ED.float())


def exact_linear(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """As the reference; on CUDA with bfloat16 `x_ND` and float32 `weight_ED` by bfloat16 products."""
    if kernels.enabled(x_ND) and x_ND.dtype == torch.bfloat16 and weight_ED.dtype == torch.float32:
        return _SplitLinear.apply(x_ND, weight_ED)
    return reference_exact_linear(x_ND, weight_ED)


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_ED: Tensor) -> Tensor:
        from trinity.ops.kernels.elementwise import split_matrix

        pieces_3ED = split_matrix(weight_ED)
        ctx.save_for_backward(x_ND, pieces_3ED)
        logits_N3E = _mm(x_ND, pieces_3ED.flatten(0, 1).t(), torch.float32)
        return logits_N3E.view(-1, 3, weight_ED.shape[0]).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        from trinity.ops.kernels.elementwise import split_rows

        x_ND, pieces_3ED = ctx.saved_tensors
        E = pieces_3ED.shape[1]
        d_N3E = split_rows(d_outputs[0])  # high, middle, high
        high_ED, middle_ED, _ = pieces_3ED
        dx_ND = d_N3E @ torch.cat([high_ED, high_ED, middle_ED])
        d_weight_2ED = _mm(d_N3E[:, : 2 * E].t(), x_ND, torch.float32).view(2, E, -1)
        return dx_ND, d_weight_2ED.sum(dim=0)


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b of bfloat16 with the sums kept in `dtype`; a CPU, where tests run this, widens."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)
