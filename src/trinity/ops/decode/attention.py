"""Attention of one new token of each request over the blocks of the cache, keys split over programs.

A program has one key/value head of one request, all query heads of that group, and one range of cached positions; a
second kernel brings the ranges together (split-KV, Dao et al. 2023, "Flash-Decoding"). Queries and the new key are
normalised and turned here, and the program of the first range also writes the new key and value into the cache. The
lengths are read on the device, so that a captured CUDA graph serves any.

Suffixes as in `trinity.model`; S = ranges (a constant of the launch), of which a request uses as many as its keys need.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# (the checker takes Triton's language for Python)

import torch
import triton
import triton.language as tl
from torch import Tensor

from trinity.ops.decode.rows import reference_heads, turned

TILE = 64
"""Keys of one step of a program."""


def reference_decode_attention(
    qkvg_BC: Tensor, q_norm_K: Tensor, k_norm_K: Tensor, turn: tuple[Tensor, Tensor] | None, heads: tuple[int, int],
    eps: float, old_k: list[Tensor], old_v: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(o * sigmoid(gate) [B, H*K], new keys [B, G, K], new values), each request over its own old keys [S_b, G, K]."""
    H, G = heads
    q_BHK, k_BGK, v_BGK = reference_heads(qkvg_BC, q_norm_K, k_norm_K, turn, heads, eps)
    outputs = []
    for q_HK, k_GK, v_GK, k_old, v_old in zip(q_BHK, k_BGK, v_BGK, old_k, old_v, strict=True):
        k_SHK = torch.cat((k_old.float(), k_GK[None])).repeat_interleave(H // G, dim=1)
        v_SHK = torch.cat((v_old.float(), v_GK[None].float())).repeat_interleave(H // G, dim=1)
        weights_HS = (torch.einsum("hk,shk->hs", q_HK, k_SHK) * q_HK.shape[-1] ** -0.5).softmax(-1)
        outputs.append(torch.einsum("hs,shk->hk", weights_HS, v_SHK).flatten())
    o_BC = torch.stack(outputs)
    return o_BC * torch.sigmoid(qkvg_BC[:, -o_BC.shape[1] :].float()), k_BGK, v_BGK


@triton.jit
def span(position, WINDOW: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr):
    """(first old position that is seen, positions of each range, ranges in use) of a query at `position`."""
    low = position * 0
    if WINDOW > 0:
        low = tl.maximum(position - WINDOW + 1, 0)
    count = position - low
    share = ((count + S - 1) // S + TILE - 1) // TILE * TILE
    share = tl.maximum(share, TILE)
    return low, share, tl.maximum((count + share - 1) // share, 1)


@triton.jit
def decode_attention_kernel(
    qkvg, q_norm, k_norm, cos, sin, positions, slots, table, table_width, k_cache, v_cache, peak_out, mass_out, sum_out,
    eps, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BH: tl.constexpr, RATIO: tl.constexpr, BR: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, RING: tl.constexpr, WINDOW: tl.constexpr, S: tl.constexpr,
    TILE: tl.constexpr, TURN: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    g = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    HALF: tl.constexpr = K // 2
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row)
    low, share, used = span(position, WINDOW, S, TILE)
    if (slot >= 0) & (part < used):
        i = tl.arange(0, BH)
        inside = i < HALF
        r = tl.arange(0, BR)
        heads = g * RATIO + r
        there = (r < RATIO)[:, None] & inside[None, :]
        source = qkvg + row * WIDTH + heads[:, None] * K + i[None, :]
        qa = tl.load(source, mask=there, other=0.0).to(tl.float32)
        qb = tl.load(source + HALF, mask=there, other=0.0).to(tl.float32)
        factor = tl.rsqrt((tl.sum(qa * qa, 1) + tl.sum(qb * qb, 1)) / K + eps)[:, None]
        qa = qa * factor * tl.load(q_norm + i, mask=inside, other=0.0).to(tl.float32)[None, :]
        qb = qb * factor * tl.load(q_norm + HALF + i, mask=inside, other=0.0).to(tl.float32)[None, :]
        if TURN:
            c = tl.load(cos + row * HALF + i, mask=inside, other=1.0)[None, :]
            s = tl.load(sin + row * HALF + i, mask=inside, other=0.0)[None, :]
            qa, qb = qa * c - qb * s, qb * c + qa * s
        qa = qa.to(TYPE)
        qb = qb.to(TYPE)
        source = qkvg + row * WIDTH + (H + g) * K
        ka, kb = turned(source, k_norm, cos + row * HALF, sin + row * HALF, eps, K, HALF, BH, TURN)
        va = tl.load(source + G * K + i, mask=inside, other=0.0).to(tl.float32)
        vb = tl.load(source + G * K + HALF + i, mask=inside, other=0.0).to(tl.float32)
        # What the cache will give back from now on is what this token sees too.
        ka = ka.to(k_cache.dtype.element_ty)
        kb = kb.to(k_cache.dtype.element_ty)
        va = va.to(v_cache.dtype.element_ty)
        vb = vb.to(v_cache.dtype.element_ty)
        row_table = table + slot * table_width
        if part == 0:
            nth = position // BLOCK
            if RING > 0:
                nth = nth % RING
            place = tl.load(row_table + nth) * BLOCK + position % BLOCK
            target = (place * G + g) * K + i
            tl.store(k_cache + target, ka, mask=inside)
            tl.store(k_cache + target + HALF, kb, mask=inside)
            tl.store(v_cache + target, va, mask=inside)
            tl.store(v_cache + target + HALF, vb, mask=inside)
            scores = tl.sum(qa.to(tl.float32) * ka.to(TYPE).to(tl.float32)[None, :], 1)
            scores += tl.sum(qb.to(tl.float32) * kb.to(TYPE).to(tl.float32)[None, :], 1)
            peak = scores * scale
            mass = tl.full([BR], 1.0, tl.float32)
            oa = tl.zeros([BR, BH], tl.float32) + va.to(TYPE).to(tl.float32)[None, :]
            ob = tl.zeros([BR, BH], tl.float32) + vb.to(TYPE).to(tl.float32)[None, :]
        else:
            peak = tl.full([BR], float("-inf"), tl.float32)
            mass = tl.zeros([BR], tl.float32)
            oa = tl.zeros([BR, BH], tl.float32)
            ob = tl.zeros([BR, BH], tl.float32)
        begin = low + part * share
        end = tl.minimum(begin + share, position)
        for start in range(begin, end, TILE):
            p = start + tl.arange(0, TILE)
            live = p < end
            nth = p // BLOCK
            if RING > 0:
                nth = nth % RING
            place = tl.load(row_table + nth, mask=live, other=0) * BLOCK + p % BLOCK
            offset = ((place * G + g) * K)[:, None] + i[None, :]
            mask = live[:, None] & inside[None, :]
            k1 = tl.load(k_cache + offset, mask=mask, other=0.0).to(TYPE)
            k2 = tl.load(k_cache + offset + HALF, mask=mask, other=0.0).to(TYPE)
            scores = tl.dot(qa, tl.trans(k1), input_precision="ieee")
            scores += tl.dot(qb, tl.trans(k2), input_precision="ieee")
            scores = tl.where(live[None, :], scores * scale, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            shrink = tl.exp2(peak - higher)
            weights = tl.exp2(scores - higher[:, None])
            mass = mass * shrink + tl.sum(weights, 1)
            v1 = tl.load(v_cache + offset, mask=mask, other=0.0).to(TYPE)
            v2 = tl.load(v_cache + offset + HALF, mask=mask, other=0.0).to(TYPE)
            weights = weights.to(TYPE)
            oa = oa * shrink[:, None] + tl.dot(weights, v1, input_precision="ieee")
            ob = ob * shrink[:, None] + tl.dot(weights, v2, input_precision="ieee")
            peak = higher
        at = (row * H + heads) * S + part
        tl.store(peak_out + at, peak, mask=r < RATIO)
        tl.store(mass_out + at, mass, mask=r < RATIO)
        target = sum_out + at[:, None] * K + i[None, :]
        tl.store(target, oa, mask=there)
        tl.store(target + HALF, ob, mask=there)


@triton.jit
def gather_parts_kernel(
    qkvg, positions, slots, peaks, masses, sums, out,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, S: tl.constexpr,
    BS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BK)
    target = out + (row * H + head) * K + k
    if tl.load(slots + row) >= 0:
        _, _, used = span(tl.load(positions + row), WINDOW, S, TILE)
        s = tl.arange(0, BS)
        live = s < used
        at = (row * H + head) * S + s
        peak = tl.load(peaks + at, mask=live, other=float("-inf"))
        factor = tl.exp2(peak - tl.max(peak, 0))
        mass = tl.sum(tl.load(masses + at, mask=live, other=0.0) * factor, 0)
        mask = live[:, None] & (k < K)[None, :]
        parts = tl.load(sums + at[:, None] * K + k[None, :], mask=mask, other=0.0)
        o = tl.sum(parts * factor[:, None], 0) / mass
        gate = tl.load(qkvg + row * WIDTH + WIDTH - H * K + head * K + k, mask=k < K, other=0.0).to(tl.float32)
        tl.store(target, (o / (1 + tl.exp(-gate))).to(out.dtype.element_ty), mask=k < K)
    else:
        tl.store(target, tl.zeros([BK], tl.float32).to(out.dtype.element_ty), mask=k < K)


def decode_attention(
    qkvg_BC: Tensor,
    q_norm_K: Tensor,
    k_norm_K: Tensor,
    turn: tuple[Tensor, Tensor] | None,
    heads: tuple[int, int],
    eps: float,
    positions_B: Tensor,
    slots_B: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out_BC: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    *,
    window: int | None,
    ring: int | None,
) -> None:
    """As `reference_decode_attention`, into `out_BC`; the new keys and values go into the cache.

    Positions int32, slots int32 (negative: the row is idle and its output zero), `table` int64 [slots, blocks], caches
    [blocks, block, G, K]; `parts` float32 [B, H, S], [B, H, S] and [B, H, S, K] is room for the ranges' results.
    """
    B, width = qkvg_BC.shape
    H, G = heads
    K = q_norm_K.shape[0]
    S = parts[0].shape[2]
    block = k_cache.shape[1]
    cos, sin = turn if turn is not None else (q_norm_K, q_norm_K)
    compute = k_cache.dtype if k_cache.dtype.itemsize > 1 else out_BC.dtype
    triton_type = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[compute]
    decode_attention_kernel[(S, G, B)](
        qkvg_BC, q_norm_K, k_norm_K, cos, sin, positions_B, slots_B, table, table.stride(0), k_cache, v_cache, *parts,
        eps, K**-0.5 * 1.4426950408889634,
        H=H, G=G, K=K, BH=max(16, triton.next_power_of_2(K // 2)), RATIO=H // G,
        BR=max(16, triton.next_power_of_2(H // G)), WIDTH=width, BLOCK=block, RING=ring or 0, WINDOW=window or 0, S=S,
        TILE=TILE, TURN=turn is not None, TYPE=triton_type, num_warps=4, num_stages=2,
    )  # fmt: skip
    gather_parts_kernel[(H, B)](
        qkvg_BC, positions_B, slots_B, *parts, out_BC,
        H=H, K=K, BK=triton.next_power_of_2(K), WIDTH=width, WINDOW=window or 0, S=S, BS=triton.next_power_of_2(S),
        TILE=TILE, num_warps=4,
    )  # fmt: skip
