"""Attention of chunks of prompts over their cached past and themselves, without a mask in memory.

Row b of the batch has `counts[b]` new tokens, from position `starts[b]` on; the keys of its past lie at arbitrary
places (a ring), with their positions beside them. Online softmax over tiles (Dao et al. 2022, "FlashAttention"); tiles
that the window or causality hides are not read.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# (the checker takes Triton's language for Python)

import torch
import triton
import triton.language as tl
from torch import Tensor

from trinity.ops.attention import reference_attention


def reference_prompt_attention(
    q_BCHK: Tensor, k_BCGK: Tensor, v_BCGK: Tensor, starts_B: Tensor, window: int | None,
    old: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """[B, C, H, K]; `old` is (keys [B, S, G, K], values, positions [B, S] with -1 where there is no key)."""
    query_BC = starts_B[:, None] + torch.arange(q_BCHK.shape[1], device=q_BCHK.device)
    key_BS = query_BC
    if old is not None:
        k_BCGK, v_BCGK = torch.cat((old[0], k_BCGK), 1), torch.cat((old[1], v_BCGK), 1)
        key_BS = torch.cat((old[2], query_BC), 1)
    distance = query_BC[:, :, None] - key_BS[:, None, :]
    seen = (distance >= 0) & (key_BS >= 0)[:, None]
    return reference_attention(q_BCHK, k_BCGK, v_BCGK, seen if window is None else seen & (distance < window))


@triton.jit
def absorb(q, peak, mass, o, k, v, seen, scale):
    """One tile of keys and values more in the running softmax."""
    scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(peak - safe)
    weights = tl.exp2(scores - safe[:, None])
    mass = mass * shrink + tl.sum(weights, 1)
    o = tl.dot(weights.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
    return higher, mass, o


@triton.jit
def prompt_attention_kernel(
    q, k, v, old_k, old_v, old_positions, starts, out, C, num_old, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, WINDOW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, HAS_OLD: tl.constexpr,
):  # fmt: skip
    # The last queries see most keys: they begin first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    g = head // (H // G)
    m = tile * BM + tl.arange(0, BM)
    c = tl.arange(0, BK)
    inside = c < K
    q_mask = (m < C)[:, None] & inside[None, :]
    qv = tl.load(q + ((row * C + m[:, None]) * H + head) * K + c[None, :], mask=q_mask, other=0.0)
    peak = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, BK], tl.float32)
    start = tl.load(starts + row)
    if HAS_OLD:
        query = start + m
        reaches = start > 0
        if WINDOW > 0:
            reaches = reaches & (tile * BM - WINDOW + 1 < 0)
        if reaches:
            for first in range(0, num_old, BN):
                n = first + tl.arange(0, BN)
                key = tl.load(old_positions + row * num_old + n, mask=n < num_old, other=-1)
                seen = (key >= 0)[None, :] & (query[:, None] >= key[None, :])
                if WINDOW > 0:
                    seen = seen & (query[:, None] - key[None, :] < WINDOW)
                at = ((row * num_old + n[:, None]) * G + g) * K + c[None, :]
                mask = (n < num_old)[:, None] & inside[None, :]
                kv = tl.load(old_k + at, mask=mask, other=0.0).to(qv.dtype)
                vv = tl.load(old_v + at, mask=mask, other=0.0).to(qv.dtype)
                peak, mass, o = absorb(qv, peak, mass, o, kv, vv, seen, scale)
    # Tiles that every query of the tile sees whole need no mask; those at the window's and at the diagonal's edge do.
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(tile * BM - WINDOW + 1, 0) // BN * BN
    end = tl.minimum((tile + 1) * BM, C)
    for first in range(begin, end, BN):
        n = first + tl.arange(0, BN)
        seen = m[:, None] >= n[None, :]
        if WINDOW > 0:
            seen = seen & (m[:, None] - n[None, :] < WINDOW)
        at = ((row * C + n[:, None]) * G + g) * K + c[None, :]
        mask = (n < C)[:, None] & inside[None, :]
        kv = tl.load(k + at, mask=mask, other=0.0)
        vv = tl.load(v + at, mask=mask, other=0.0)
        peak, mass, o = absorb(qv, peak, mass, o, kv, vv, seen, scale)
    o = o / mass[:, None]
    tl.store(out + ((row * C + m[:, None]) * H + head) * K + c[None, :], o.to(out.dtype.element_ty), mask=q_mask)


def prompt_attention(
    q_BCHK: Tensor,
    k_BCGK: Tensor,
    v_BCGK: Tensor,
    starts_B: Tensor,
    window: int | None,
    old: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """As `reference_prompt_attention`; contiguous tensors, starts and positions of any integer type."""
    B, C, H, K = q_BCHK.shape
    G = k_BCGK.shape[2]
    out = torch.empty_like(q_BCHK)
    BM, BN = (128, 64) if C > 64 else (max(16, triton.next_power_of_2(C)), 32)
    old_k, old_v, positions = old if old is not None else (k_BCGK, v_BCGK, starts_B)
    prompt_attention_kernel[(triton.cdiv(C, BM), H, B)](
        q_BCHK, k_BCGK, v_BCGK, old_k, old_v, positions, starts_B, out, C, old_k.shape[1],
        K**-0.5 * 1.4426950408889634,
        H=H, G=G, K=K, BK=max(16, triton.next_power_of_2(K)), WINDOW=window or 0, BM=BM, BN=BN,
        HAS_OLD=old is not None, num_warps=8 if BM == 128 else 4, num_stages=3,
    )  # fmt: skip
    return out
