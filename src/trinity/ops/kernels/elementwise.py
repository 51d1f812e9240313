# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Triton's language is not typed.
"""Sums and splits of one pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _accumulate(total, part, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    value = tl.load(total + index, mask=inside) + tl.load(part + index, mask=inside).to(tl.float32)
    tl.store(total + index, value, mask=inside)


def accumulate_(total: Tensor, part: Tensor) -> None:
    """total += part, where `total` is float32 and `part` of any float type; equal shapes and layouts."""
    assert total.is_contiguous() and part.is_contiguous() and total.shape == part.shape  # noqa: PT018
    size = total.numel()
    _accumulate[(triton.cdiv(size, BLOCK),)](total, part, size, BLOCK=BLOCK, num_warps=8)


@triton.jit
def _split(x, out, size, width, piece_stride, row_stride, REPEAT: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    value = tl.load(x + index, mask=inside, other=0.0)
    place = out + index // width * row_stride + index % width
    high = value.to(tl.bfloat16)
    value -= high.to(tl.float32)
    middle = value.to(tl.bfloat16)
    low = (value - middle.to(tl.float32)).to(tl.bfloat16)
    tl.store(place, high, mask=inside)
    tl.store(place + piece_stride, middle, mask=inside)
    tl.store(place + 2 * piece_stride, high if REPEAT else low, mask=inside)


def split_rows(x_NE: Tensor) -> Tensor:
    """float32 [N, E] -> bfloat16 [N, 3E]: high parts, middle parts (high + middle hold 16 bits), high parts again."""
    N, E = x_NE.shape
    out = torch.empty(N, 3 * E, dtype=torch.bfloat16, device=x_NE.device)
    grid = (triton.cdiv(x_NE.numel(), BLOCK),)
    _split[grid](x_NE.contiguous(), out, x_NE.numel(), E, E, 3 * E, REPEAT=True, BLOCK=BLOCK, num_warps=8)
    return out


def split_matrix(weight_ED: Tensor) -> Tensor:
    """float32 [E, D] -> bfloat16 [3, E, D]: high, middle and low parts, whose sum is the weight (24 bits)."""
    E, D = weight_ED.shape
    out = torch.empty(3, E, D, dtype=torch.bfloat16, device=weight_ED.device)
    grid = (triton.cdiv(weight_ED.numel(), BLOCK),)
    _split[grid](weight_ED.contiguous(), out, weight_ED.numel(), D, E * D, D, REPEAT=False, BLOCK=BLOCK, num_warps=8)
    return out


@triton.jit
def noisy(value, seed, index):
    """float32 with random bits below bfloat16's last place, cut off: rounding up or down by chance."""
    noise = tl.randint(seed, index.to(tl.int32)).to(tl.int32, bitcast=True) & 0xFFFF
    bits = (value.to(tl.int32, bitcast=True) + noise) & -65536
    finite = tl.abs(value) < float("inf")
    return tl.where(finite, bits.to(tl.float32, bitcast=True), value)


@triton.jit
def _stochastic_round(value, target, size, seed, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    rounded = noisy(tl.load(value + index, mask=inside, other=0.0), seed, index)
    tl.store(target + index, rounded.to(tl.bfloat16), mask=inside)


def stochastic_round_(target: Tensor, value: Tensor, seed: int) -> None:
    """bfloat16 `target` <- float32 `value`; both contiguous."""
    assert target.is_contiguous() and value.is_contiguous() and target.shape == value.shape  # noqa: PT018
    size = value.numel()
    _stochastic_round[(triton.cdiv(size, BLOCK),)](value, target, size, seed, BLOCK=BLOCK, num_warps=8)
