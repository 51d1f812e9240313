# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Triton's language is not typed.
"""Choosing experts and measuring the choice, on fp32 logits [N, E]; a block of rows a program.

Scores are computed again from the logits wherever they are needed: [N, E] is read, never kept twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trinity.ops.autograd import once_differentiable
from trinity.ops.kernels import power_of_two

ROWS = 16
"""Tokens of a program."""


@triton.jit
def _select(
    logits, bias, indices, weights, N, E, scale,
    K: tl.constexpr, K_BLOCK: tl.constexpr, E_BLOCK: tl.constexpr, ROWS: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, E_BLOCK)
    inside = (row < N)[:, None] & (col < E)[None, :]
    score = tl.sigmoid(tl.load(logits + row[:, None] * E + col[None, :], mask=inside, other=0.0))
    left = score + tl.load(bias + col, mask=col < E, other=0.0)[None, :]
    left = tl.where((col < E)[None, :], left, float("-inf"))
    slot = tl.arange(0, K_BLOCK)[None, :]
    picked = tl.zeros((ROWS, K_BLOCK), tl.float32)
    for j in tl.static_range(K):
        best = tl.max(left, 1)
        # The lowest of equals; where all are NaN, the last expert: every index must be one.
        chosen = tl.min(tl.where(left == best[:, None], col[None, :], E - 1), 1)
        is_chosen = col[None, :] == chosen[:, None]
        weight = tl.sum(tl.where(is_chosen, score, 0.0), 1)
        picked = tl.where(slot == j, weight[:, None], picked)
        left = tl.where(is_chosen, float("-inf"), left)
        tl.store(indices + row * K + j, chosen.to(tl.int64), mask=row < N)  # pyright: ignore[reportAttributeAccessIssue]
    if NORMALISE:
        picked = picked / (tl.sum(picked, 1)[:, None] + 1e-20)
    tl.store(weights + row[:, None] * K + slot, picked * scale, mask=(row < N)[:, None] & (slot < K))


@triton.jit
def _select_backward(
    d_weights, logits, indices, d_logits, N, E, scale,
    K: tl.constexpr, E_BLOCK: tl.constexpr, ROWS: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, E_BLOCK)
    inside = (row < N)[:, None] & (col < E)[None, :]
    place = row[:, None] * E + col[None, :]
    score = tl.sigmoid(tl.load(logits + place, mask=inside, other=0.0))
    total = tl.full((ROWS,), 1e-20, tl.float32)
    along = tl.zeros((ROWS,), tl.float32)
    d_score = tl.zeros((ROWS, E_BLOCK), tl.float32)
    chosen_any = tl.zeros((ROWS, E_BLOCK), tl.float32)
    for j in tl.static_range(K):
        chosen = tl.load(indices + row * K + j, mask=row < N, other=0)
        grad = tl.load(d_weights + row * K + j, mask=row < N, other=0.0) * scale
        is_chosen = (col[None, :] == chosen[:, None]).to(tl.float32)
        weight = tl.sum(is_chosen * score, 1)
        total += weight
        along += weight * grad
        d_score += is_chosen * grad[:, None]
        chosen_any += is_chosen
    if NORMALISE:
        # w_i = s_i / S: dL/ds_i = (g_i - sum_j g_j s_j / S) / S
        d_score = (d_score - chosen_any * (along / total)[:, None]) / total[:, None]
    tl.store(d_logits + place, d_score * score * (1 - score), mask=inside)


class Select(torch.autograd.Function):
    """(logits [N, E], bias [E]) -> (indices [N, k] int64, weights [N, k]): `model/router.py`, `Router.forward`."""

    @staticmethod
    def forward(ctx, logits_NE: Tensor, bias_E: Tensor, k: int, normalise: bool, scale: float):
        N, E = logits_NE.shape
        logits_NE = logits_NE.contiguous()
        indices = torch.empty(N, k, dtype=torch.int64, device=logits_NE.device)
        weights = torch.empty(N, k, dtype=torch.float32, device=logits_NE.device)
        _select[(triton.cdiv(N, ROWS),)](
            logits_NE, bias_E, indices, weights, N, E, scale,
            K=k, K_BLOCK=power_of_two(k), E_BLOCK=power_of_two(E), ROWS=ROWS, NORMALISE=normalise, num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(logits_NE, indices)
        ctx.settings = normalise, scale
        ctx.mark_non_differentiable(indices)
        return indices, weights

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        logits_NE, indices = ctx.saved_tensors
        normalise, scale = ctx.settings
        N, E = logits_NE.shape
        d_logits = torch.empty_like(logits_NE)
        _select_backward[(triton.cdiv(N, ROWS),)](
            d_outputs[1].contiguous(), logits_NE, indices, d_logits, N, E, scale,
            K=indices.shape[1], E_BLOCK=power_of_two(E), ROWS=ROWS, NORMALISE=normalise, num_warps=4,
        )  # fmt: skip
        return d_logits, None, None, None, None


@triton.jit
def _count(indices, document, real, times, counts, N, E, K: tl.constexpr, E_BLOCK: tl.constexpr, ROWS: tl.constexpr,
           HAS_REAL: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    if HAS_REAL:
        inside = inside & (tl.load(real + row, mask=inside, other=0) != 0)
    col = tl.arange(0, E_BLOCK)
    doc = tl.load(document + row, mask=inside, other=0)
    chosen_any = tl.zeros((ROWS, E_BLOCK), tl.int32)
    for j in tl.static_range(K):
        chosen = tl.load(indices + row * K + j, mask=inside, other=-1)
        chosen_any += (col[None, :] == chosen[:, None]).to(tl.int32)
    tl.atomic_add(times + doc[:, None] * E + col[None, :], chosen_any, mask=chosen_any > 0, sem="relaxed")
    here = tl.sum(chosen_any, 0)
    tl.atomic_add(counts + col, here, mask=here > 0, sem="relaxed")


@triton.jit
def _balance(
    logits, document, real, times, parts, N, E, P, K: tl.constexpr, E_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_REAL: tl.constexpr,
):  # fmt: skip
    """Of each program: sum of share * load, of entropy and of tokens, smallest and largest logit."""
    program = tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    counted = row < N
    if HAS_REAL:
        counted = counted & (tl.load(real + row, mask=counted, other=0) != 0)
    col = tl.arange(0, E_BLOCK)
    inside = counted[:, None] & (col < E)[None, :]
    logit = tl.load(logits + row[:, None] * E + col[None, :], mask=inside, other=0.0)
    score = tl.where(inside, tl.sigmoid(logit), 0.0)
    share = score / tl.maximum(tl.sum(score, 1), 1e-38)[:, None]
    doc = tl.load(document + row, mask=counted, other=0)
    load = tl.load(times + doc[:, None] * E + col[None, :], mask=inside, other=0).to(tl.float32)
    load = load * (K / tl.maximum(tl.sum(load, 1), 1.0))[:, None]
    entropy = tl.where(inside, -share * tl.log(share + 1e-20), 0.0)
    tl.store(parts + program, tl.sum(tl.sum(share * load, 1), 0))
    tl.store(parts + P + program, tl.sum(tl.sum(entropy, 1), 0))
    tl.store(parts + 2 * P + program, tl.sum(counted.to(tl.float32), 0))
    tl.store(parts + 3 * P + program, tl.max(tl.max(tl.where(inside, -logit, float("-inf")), 1), 0))
    tl.store(parts + 4 * P + program, tl.max(tl.max(tl.where(inside, logit, float("-inf")), 1), 0))


@triton.jit
def _balance_backward(
    d_loss, tokens, logits, document, real, times, d_logits, N, E, factor, K: tl.constexpr, E_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, HAS_REAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    counted = row < N
    if HAS_REAL:
        counted = counted & (tl.load(real + row, mask=counted, other=0) != 0)
    col = tl.arange(0, E_BLOCK)
    exists = (row < N)[:, None] & (col < E)[None, :]
    inside = counted[:, None] & exists
    place = row[:, None] * E + col[None, :]
    score = tl.where(inside, tl.sigmoid(tl.load(logits + place, mask=inside, other=0.0)), 0.0)
    total = tl.maximum(tl.sum(score, 1), 1e-38)[:, None]
    doc = tl.load(document + row, mask=counted, other=0)
    load = tl.load(times + doc[:, None] * E + col[None, :], mask=inside, other=0).to(tl.float32)
    load = load * (K / tl.maximum(tl.sum(load, 1), 1.0))[:, None]
    mean = (tl.sum(score * load, 1))[:, None] / total
    grad = tl.load(d_loss) * factor / tl.load(tokens)
    tl.store(d_logits + place, tl.where(inside, grad * (load - mean) / total * score * (1 - score), 0.0), mask=exists)


class Balance(torch.autograd.Function):
    """(logits [N, E], indices [N, k], documents) -> (counts [E], sequence loss, logit min, logit max, entropy).

    `document_N` int64 below N; `real_N` bool or None. The formulas stand at `routing_stats` in `model/router.py`.
    """

    @staticmethod
    def forward(ctx, logits_NE: Tensor, indices_Nk: Tensor, document_N: Tensor, num_documents: int, real_N):
        N, E = logits_NE.shape
        k, programs = indices_Nk.shape[1], triton.cdiv(N, ROWS)
        logits_NE, indices_Nk, document_N = logits_NE.contiguous(), indices_Nk.contiguous(), document_N.contiguous()
        counts_all = torch.zeros((num_documents + 1) * E, dtype=torch.int32, device=logits_NE.device)
        times, counts = counts_all[E:], counts_all[:E]
        sizes = {"K": k, "E_BLOCK": power_of_two(E), "ROWS": ROWS, "HAS_REAL": real_N is not None, "num_warps": 4}
        real = real_N.to(torch.uint8) if real_N is not None else document_N
        _count[(programs,)](indices_Nk, document_N, real, times, counts, N, E, **sizes)
        parts_5P = torch.empty(5, programs, dtype=torch.float32, device=logits_NE.device)
        _balance[(programs,)](logits_NE, document_N, real, times, parts_5P, N, E, programs, **sizes)
        sums, most = parts_5P[:3].sum(1), parts_5P[3:].amax(1)
        tokens = sums[2].clamp(min=1)
        ctx.save_for_backward(logits_NE, document_N, real, times, tokens)
        ctx.sizes, ctx.factor = sizes, E / k
        rest = counts.long(), -most[0], most[1], sums[1] / tokens
        ctx.mark_non_differentiable(*rest)
        return rest[0], sums[0] * (E / k) / tokens, *rest[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        logits_NE, document_N, real, times, tokens = ctx.saved_tensors
        N, E = logits_NE.shape
        d_logits = torch.empty_like(logits_NE)
        _balance_backward[(triton.cdiv(N, ROWS),)](
            d_outputs[1].float().contiguous(), tokens, logits_NE, document_N, real, times, d_logits, N, E, ctx.factor,
            **ctx.sizes,
        )  # fmt: skip
        return d_logits, None, None, None, None
