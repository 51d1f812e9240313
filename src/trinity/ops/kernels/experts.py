# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Triton's language is not typed.
"""The routed experts around `grouped_mm`: gather rows, weighted SwiGLU, add rows up; one autograd node for all of it.

A token's weight is applied to the hidden activation (width F) rather than to the output (width D): the product with
`down` is linear, so the sum is the same, the output rows need not be kept for the weights' gradient, and the sum over
a token's experts is plain. What is kept of a layer: its input [N, D] and the gate/up products [R, 2F].
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from trinity.ops.autograd import once_differentiable
from trinity.ops.fp8 import quantize_columns, quantize_rows, scaled_product
from trinity.ops.kernels import power_of_two, warps


@triton.jit
def _gather(x, index, out, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(index + row).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < D
    tl.store(out + row * D + col, tl.load(x + source * D + col, mask=inside), mask=inside)


def gather_rows(x_ND: Tensor, token_R: Tensor) -> Tensor:
    """[R, D]: x of each row's token."""
    x_ND = x_ND.contiguous()
    D = x_ND.shape[1]
    out = torch.empty(token_R.shape[0], D, dtype=x_ND.dtype, device=x_ND.device)
    block = power_of_two(D)
    _gather[(token_R.shape[0],)](x_ND, token_R, out, D, BLOCK=block, num_warps=warps(block))
    return out


@triton.jit
def _add_up(rows, index, weights, out, D, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < D
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(K):
        row = tl.load(index + token * K + j).to(tl.int64)
        value = tl.load(rows + row * D + col, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * K + j).to(tl.float32)
        total += value
    tl.store(out + token * D + col, total.to(out.dtype.element_ty), mask=inside)


def add_up_rows(y_RD: Tensor, row_Nk: Tensor, weights_Nk: Tensor | None = None) -> Tensor:
    """[N, D]: the (weighted) sum over each token's rows, summed in fp32."""
    y_RD, row_Nk = y_RD.contiguous(), row_Nk.contiguous()
    N, k = row_Nk.shape
    D = y_RD.shape[1]
    out = torch.empty(N, D, dtype=y_RD.dtype, device=y_RD.device)
    block = power_of_two(D)
    weights = y_RD if weights_Nk is None else weights_Nk.contiguous()
    _add_up[(N,)](
        y_RD, row_Nk, weights, out, D, K=k, WEIGHTED=weights_Nk is not None, BLOCK=block, num_warps=warps(block)
    )
    return out


@triton.jit
def _swiglu_forward(gate_up, weights, out, F, size, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    row, col = index // F, index % F
    gate = tl.load(gate_up + row * 2 * F + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + col, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        value *= tl.load(weights + row, mask=inside, other=0.0)
    tl.store(out + index, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    d_out, gate_up, weights, d_gate_up, out, d_weights, F, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """One row a program: also writes the activation again and the gradient of the row's weight."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights + row)
    for start in range(0, F, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = col < F
        gate = tl.load(gate_up + row * 2 * F + col, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * F + F + col, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(d_out + row * F + col, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        opened = gate * share
        if WEIGHTED:
            total += grad * opened * up
            tl.store(out + row * F + col, (weight * opened * up).to(out.dtype.element_ty), mask=inside)
            grad *= weight
        d_gate = grad * up * (share + opened * (1 - share))
        tl.store(d_gate_up + row * 2 * F + col, d_gate.to(d_gate_up.dtype.element_ty), mask=inside)
        tl.store(d_gate_up + row * 2 * F + F + col, (grad * opened).to(d_gate_up.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(d_weights + row, tl.sum(total, 0))


def swiglu_rows(gate_up: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """[..., 2F] -> [..., F]: silu(gate) * up, times each row's weight (fp32) if there is one. No gradient."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    size, block = out.numel(), 2048
    _swiglu_forward[(triton.cdiv(size, block),)](
        gate_up, gate_up if weights_R is None else weights_R, out, width, size,
        WEIGHTED=weights_R is not None, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return out


def swiglu_rows_backward(
    d_out: Tensor, gate_up: Tensor, weights_R: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(gradient of gate_up, the weighted activation once more, gradient of the weights); the latter two if weighted."""
    d_out, weighted = d_out.contiguous(), weights_R is not None
    width = d_out.shape[-1]
    rows = d_out.numel() // width
    d_gate_up = torch.empty_like(gate_up)
    out = torch.empty_like(d_out) if weighted else None
    d_weights_R = torch.empty_like(weights_R) if weights_R is not None else None
    block = min(1024, power_of_two(width))
    _swiglu_backward[(rows,)](
        d_out, gate_up, weights_R if weighted else d_out, d_gate_up, out if weighted else d_out,
        d_weights_R if weighted else d_out, width, WEIGHTED=weighted, BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    return d_gate_up, out, d_weights_R


class SwiGLU(torch.autograd.Function):
    """[..., 2F] -> [..., F] without weights."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        return swiglu_rows(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        (gate_up,) = ctx.saved_tensors
        return swiglu_rows_backward(d_outputs[0], gate_up)[0]


class Experts(torch.autograd.Function):
    """All of the routed experts of a layer: (x [N, D], weights [N, k], gate_up, down, order, fp8) -> [N, D]."""

    @staticmethod
    def forward(ctx, x_ND, weights_Nk, gate_up_E2FD, down_EDF, token_R, row_Nk, ends_E, fp8):
        weights_R = _by_row(weights_Nk.float(), row_Nk)
        gate_up_R2F = _forward(gather_rows(x_ND, token_R), gate_up_E2FD, ends_E, fp8)
        y_RD = _forward(swiglu_rows(gate_up_R2F, weights_R), down_EDF, ends_E, fp8)
        ctx.save_for_backward(x_ND, weights_R, gate_up_E2FD, down_EDF, gate_up_R2F, token_R, row_Nk, ends_E)
        ctx.weights_dtype, ctx.fp8 = weights_Nk.dtype, fp8
        return add_up_rows(y_RD, row_Nk)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        x_ND, weights_R, gate_up_E2FD, down_EDF, gate_up_R2F, token_R, row_Nk, ends_E = ctx.saved_tensors
        d_y_RD = gather_rows(d_outputs[0], token_R)
        d_hidden_RF = _backward(d_y_RD, down_EDF, ends_E, ctx.fp8)
        d_gate_up_R2F, hidden_RF, d_weights_R = swiglu_rows_backward(d_hidden_RF, gate_up_R2F, weights_R)
        assert hidden_RF is not None
        assert d_weights_R is not None
        d_down_EDF = F.grouped_mm(d_y_RD.t(), hidden_RF, offs=ends_E)
        del d_y_RD, hidden_RF, d_hidden_RF
        d_x_ND = add_up_rows(_backward(d_gate_up_R2F, gate_up_E2FD, ends_E, ctx.fp8), row_Nk)
        d_gate_up_E2FD = F.grouped_mm(d_gate_up_R2F.t(), gather_rows(x_ND, token_R), offs=ends_E)
        d_weights_Nk = d_weights_R.index_select(0, row_Nk.flatten()).view_as(row_Nk).to(ctx.weights_dtype)
        return d_x_ND, d_weights_Nk, d_gate_up_E2FD, d_down_EDF, None, None, None, None


def _forward(x_RD: Tensor, weight_EFD: Tensor, ends_E: Tensor, fp8: bool) -> Tensor:
    """[R, F]: x times each expert's transposed matrix."""
    if fp8:
        return scaled_product(quantize_rows(x_RD), quantize_rows(weight_EFD), x_RD.dtype, ends_E)
    return F.grouped_mm(x_RD, weight_EFD.transpose(1, 2), offs=ends_E)


def _backward(d_RF: Tensor, weight_EFD: Tensor, ends_E: Tensor, fp8: bool) -> Tensor:
    """[R, D]: a gradient times each expert's matrix."""
    if fp8:
        return scaled_product(quantize_rows(d_RF), quantize_columns(weight_EFD), d_RF.dtype, ends_E)
    return F.grouped_mm(d_RF, weight_EFD, offs=ends_E)


def _by_row(weights_Nk: Tensor, row_Nk: Tensor) -> Tensor:
    """[R]: the weights in the order of the rows."""
    return torch.empty_like(weights_Nk.flatten()).scatter_(0, row_Nk.flatten(), weights_Nk.flatten())
