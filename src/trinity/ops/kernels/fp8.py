# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Triton's language is not typed.
"""Quantisation to e4m3 with a scale for each row, or for each column, whose values are then written transposed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trinity.ops.kernels import power_of_two, warps


@triton.jit
def _rows(x, out, scales, X, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < X
    value = tl.load(x + row * X + col, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), 0)
    scale = tl.where(largest > 0, largest / 448.0, 1.0)
    value = tl.minimum(tl.maximum(value / scale, -448.0), 448.0)
    tl.store(out + row * X + col, value.to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, scale)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., X] -> e4m3 of the same shape, float32 scales [...]."""
    x = x.contiguous()
    X = x.shape[-1]
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    block = power_of_two(X)
    if x.numel():
        _rows[(scales.numel(),)](x, out, scales, X, BLOCK=block, num_warps=warps(block))
    return out, scales


@triton.jit
def _columns(x, out, scales, X, Y, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr):
    """A strip of columns of one matrix: its largest numbers, then the numbers, which are still in the cache."""
    matrix = tl.program_id(0).to(tl.int64)
    y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    base = matrix * X * Y
    largest = tl.zeros((BLOCK_Y,), tl.float32)
    for start in range(0, X, BLOCK_X):
        i = start + tl.arange(0, BLOCK_X)
        inside = (i < X)[:, None] & (y < Y)[None, :]
        value = tl.load(x + base + i.to(tl.int64)[:, None] * Y + y[None, :], mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(value), 0))
    scale = tl.where(largest > 0, largest / 448.0, 1.0)
    tl.store(scales + matrix * Y + y, scale, mask=y < Y)
    for start in range(0, X, BLOCK_X):
        i = start + tl.arange(0, BLOCK_X)
        inside = (i < X)[:, None] & (y < Y)[None, :]
        value = tl.load(x + base + i.to(tl.int64)[:, None] * Y + y[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.minimum(tl.maximum(value / scale[None, :], -448.0), 448.0)
        target = out + base + y.to(tl.int64)[:, None] * X + i[None, :]
        tl.store(target, tl.trans(value).to(tl.float8e4nv), mask=(y < Y)[:, None] & (i < X)[None, :])


def quantize_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., X, Y] -> e4m3 [..., Y, X], float32 scales [..., Y]."""
    x = x.contiguous()
    X, Y = x.shape[-2:]
    matrices = x.numel() // (X * Y)
    out = torch.empty(*x.shape[:-2], Y, X, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(*x.shape[:-2], Y, dtype=torch.float32, device=x.device)
    block_x, block_y = min(128, power_of_two(X)), min(64, power_of_two(Y))
    _columns[(matrices, triton.cdiv(Y, block_y))](x, out, scales, X, Y, BLOCK_X=block_x, BLOCK_Y=block_y, num_warps=8)
    return out, scales
