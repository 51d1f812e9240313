# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Triton's language is not typed.
"""RMSNorm, alone and fused with the residual sum of a sandwich. Suffix P: programs that keep partial sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trinity.ops.autograd import once_differentiable
from trinity.ops.kernels import power_of_two, programs, warps


def norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x [..., D] -> x * rsqrt(mean(x^2) + eps) * weight."""
    return _Norm.apply(x, weight_D, eps)


def residual_norm(
    x: Tensor, y: Tensor, post_D: Tensor, next_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """(x + norm(y) * post, and that normalised with `next_D`, if any); x and y [..., D]."""
    return _ResidualNorm.apply(x, y, post_D, next_D, eps)


@triton.jit
def _forward(x, weight, y, rstd, D, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < D
    value = tl.load(x + row * D + col, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    gain = tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * D + col, (value * scale * gain).to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, scale)


@triton.jit
def _gradient(dy, value, gain, scale, D):
    """(dx, normalised value) of one row: dx = scale * (dy w - xhat mean(dy w xhat))."""
    unit = value * scale
    wanted = dy * gain
    return scale * (wanted - unit * (tl.sum(wanted * unit, 0) / D)), unit


@triton.jit
def _backward(dy, x, weight, rstd, dx, dw_PD, rows, D, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    one = tl.full((), 1, tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < D
    gain = tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    d_gain = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        base = one * row * D + col
        value = tl.load(x + base, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + base, mask=inside, other=0.0).to(tl.float32)
        d_value, unit = _gradient(grad, value, gain, tl.load(rstd + row), D)
        d_gain += grad * unit
        tl.store(dx + base, d_value.to(dx.dtype.element_ty), mask=inside)
    tl.store(dw_PD + one * program * D + col, d_gain, mask=inside)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        D = x.shape[-1]
        rows, block = x.numel() // D, power_of_two(D)
        y, rstd = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
        _forward[(rows,)](x, weight_D, y, rstd, D, eps, BLOCK=block, num_warps=warps(block))
        ctx.save_for_backward(x, weight_D, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        x, weight_D, rstd = ctx.saved_tensors
        dy, D = d_outputs[0].contiguous(), x.shape[-1]
        rows, block = x.numel() // D, power_of_two(D)
        num = programs(x, rows)
        dx = torch.empty_like(x)
        dw_PD = torch.empty(num, D, dtype=torch.float32, device=x.device)
        _backward[(num,)](dy, x, weight_D, rstd, dx, dw_PD, rows, D, BLOCK=block, num_warps=warps(block))
        return dx, dw_PD.sum(0).to(weight_D.dtype), None


@triton.jit
def _residual_forward(x, y, post, after, new, h, rstd_y, rstd_new, D, eps, BLOCK: tl.constexpr, HAS_NEXT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < D
    branch = tl.load(y + row * D + col, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(branch * branch, 0) / D + eps)
    gain = tl.load(post + col, mask=inside, other=0.0).to(tl.float32)
    stream = tl.load(x + row * D + col, mask=inside, other=0.0).to(tl.float32)
    total = (stream + branch * scale * gain).to(new.dtype.element_ty)
    tl.store(new + row * D + col, total, mask=inside)
    tl.store(rstd_y + row, scale)
    if HAS_NEXT:
        value = total.to(tl.float32)  # as it is stored, so that a recomputation from it agrees
        scale_new = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
        gain_next = tl.load(after + col, mask=inside, other=0.0).to(tl.float32)
        tl.store(h + row * D + col, (value * scale_new * gain_next).to(h.dtype.element_ty), mask=inside)
        tl.store(rstd_new + row, scale_new)


@triton.jit
def _residual_backward(
    d_new, d_h, y, new, post, after, rstd_y, rstd_new, dx, dy, dpost_PD, dnext_PD, rows, D,
    BLOCK: tl.constexpr, HAS_NEXT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    one = tl.full((), 1, tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < D
    gain = tl.load(post + col, mask=inside, other=0.0).to(tl.float32)
    d_gain = tl.zeros((BLOCK,), tl.float32)
    d_gain_next = tl.zeros((BLOCK,), tl.float32)
    gain_next = gain
    if HAS_NEXT:
        gain_next = tl.load(after + col, mask=inside, other=0.0).to(tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        base = one * row * D + col
        grad = tl.load(d_new + base, mask=inside, other=0.0).to(tl.float32)
        if HAS_NEXT:
            value = tl.load(new + base, mask=inside, other=0.0).to(tl.float32)
            grad_h = tl.load(d_h + base, mask=inside, other=0.0).to(tl.float32)
            through, unit = _gradient(grad_h, value, gain_next, tl.load(rstd_new + row), D)
            d_gain_next += grad_h * unit
            grad += through
            tl.store(dx + base, grad.to(dx.dtype.element_ty), mask=inside)
        branch = tl.load(y + base, mask=inside, other=0.0).to(tl.float32)
        d_branch, unit_y = _gradient(grad, branch, gain, tl.load(rstd_y + row), D)
        d_gain += grad * unit_y
        tl.store(dy + base, d_branch.to(dy.dtype.element_ty), mask=inside)
    tl.store(dpost_PD + one * program * D + col, d_gain, mask=inside)
    if HAS_NEXT:
        tl.store(dnext_PD + one * program * D + col, d_gain_next, mask=inside)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, post_D: Tensor, next_D: Tensor | None, eps: float):
        x, y = x.contiguous(), y.contiguous()
        D = x.shape[-1]
        rows, block, has_next = x.numel() // D, power_of_two(D), next_D is not None
        new = torch.empty_like(x)
        h = torch.empty_like(x) if has_next else new
        rstd_2N = torch.empty(2, rows, dtype=torch.float32, device=x.device)
        _residual_forward[(rows,)](
            x, y, post_D, next_D if has_next else post_D, new, h, rstd_2N[0], rstd_2N[1], D, eps,
            BLOCK=block, HAS_NEXT=has_next, num_warps=warps(block),
        )  # fmt: skip
        ctx.save_for_backward(y, new if has_next else None, post_D, next_D, rstd_2N)
        return new, (h if has_next else None)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        y, new, post_D, next_D, rstd_2N = ctx.saved_tensors
        D = y.shape[-1]
        rows, block, has_next = y.numel() // D, power_of_two(D), next_D is not None
        num = programs(y, rows)
        d_new = d_outputs[0].contiguous()
        d_h = d_outputs[1].contiguous() if has_next else d_new
        dx = torch.empty_like(d_new) if has_next else d_new  # without a next norm the residual passes unchanged
        dy = torch.empty_like(y)
        parts_2PD = torch.empty(2, num, D, dtype=torch.float32, device=y.device)
        _residual_backward[(num,)](
            d_new, d_h, y, new if has_next else y, post_D, next_D if has_next else post_D, rstd_2N[0], rstd_2N[1],
            dx, dy, parts_2PD[0], parts_2PD[1], rows, D, BLOCK=block, HAS_NEXT=has_next, num_warps=warps(block),
        )  # fmt: skip
        gains_2D = parts_2PD.sum(1) if has_next else parts_2PD[:1].sum(1)
        d_next = gains_2D[1].to(next_D.dtype) if has_next else None
        return dx, dy, gains_2D[0].to(post_D.dtype), d_next, None
