# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Triton's language is not typed.
"""Muon's two passes over the weights: momentum and direction in one, decay and step in the other.

Tensors are [X, R, N] or [R, N], any of them a range of rows of a contiguous parameter; the last two dimensions are
contiguous.
"""

import triton
import triton.language as tl
from torch import Tensor

from trinity.ops.kernels.elementwise import noisy

BLOCK = 4096


@triton.jit
def _direction(
    grad, momentum, skip, out, size, inner, g_stride, m_stride, beta,
    NESTEROV: tl.constexpr, HAS_SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    place = momentum + index // inner * m_stride + index % inner
    old = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    new = tl.load(grad + index // inner * g_stride + index % inner, mask=inside, other=0.0).to(tl.float32)
    if HAS_SKIP:
        new = tl.where(tl.load(skip) != 0, old, new)
    moved = old + (new - old) * (1 - beta)
    tl.store(place, moved.to(momentum.dtype.element_ty), mask=inside)
    if NESTEROV:
        moved = new + (moved - new) * beta
    tl.store(out + index, moved.to(out.dtype.element_ty), mask=inside)


def direction(grad: Tensor, momentum: Tensor, skip: Tensor | None, out: Tensor, *, beta: float, nesterov: bool) -> None:
    """momentum <- lerp(momentum, grad, 1 - beta), and what is to be orthogonalised into the contiguous `out`."""
    size, inner = grad.numel(), grad.shape[-1] * grad.shape[-2]
    _direction[(triton.cdiv(size, BLOCK),)](
        grad, momentum, grad if skip is None else skip, out, size, inner, _outer_stride(grad), _outer_stride(momentum),
        beta, NESTEROV=nesterov, HAS_SKIP=skip is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


@triton.jit
def _move(
    weight, step, skip, size, inner, w_stride, rate, decay, seed,
    HAS_SKIP: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    place = weight + index // inner * w_stride + index % inner
    old = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    new = old * (1 - decay) - rate * tl.load(step + index, mask=inside, other=0.0).to(tl.float32)
    if HAS_SKIP:
        new = tl.where(tl.load(skip) != 0, old, new)
    if STOCHASTIC:
        new = noisy(new, seed, index)
    tl.store(place, new.to(weight.dtype.element_ty), mask=inside)


def move(
    weight: Tensor, step: Tensor, skip: Tensor | None, *, rate: float, decay: float, seed: int | None = None
) -> None:
    """weight <- weight * (1 - decay) - rate * step; `step` contiguous. With a seed a bfloat16 weight is rounded up or
    down by chance."""
    size, inner = weight.numel(), weight.shape[-1] * weight.shape[-2]
    _move[(triton.cdiv(size, BLOCK),)](
        weight, step, weight if skip is None else skip, size, inner, _outer_stride(weight), rate, decay,
        0 if seed is None else seed, HAS_SKIP=skip is not None, STOCHASTIC=seed is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def _outer_stride(x: Tensor) -> int:
    assert x.stride(-1) == 1
    assert x.stride(-2) == x.shape[-1]
    return x.stride(0) if x.ndim == 3 else 0
