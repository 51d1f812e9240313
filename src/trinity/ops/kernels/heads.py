# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Triton's language is not typed.
"""What attention does to the fused projection before and after the attention itself.

`SplitHeads` takes [B, T, (2H + 2G) K], channels in the order q, k, v, gate: queries and keys are normalised and turned,
values and gate are views. Its gradient writes all four parts of one buffer, so nothing is concatenated.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trinity.ops.autograd import once_differentiable
from trinity.ops.kernels import power_of_two, programs


@triton.jit
def _forward(
    x, q_gain, k_gain, cos, sin, q, k, W, H, G, eps,
    K: tl.constexpr, HEADS: tl.constexpr, TURN: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = K // 2
    head = tl.arange(0, HEADS)[:, None]
    col = tl.arange(0, half)[None, :]
    inside = (head < H + G) & (col < half)
    base = x + token * W + head * K + col
    first = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(base + half, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.rsqrt(square / K + eps)[:, None]
        is_q = head < H
        first *= scale * tl.where(is_q, tl.load(q_gain + col), tl.load(k_gain + col)).to(tl.float32)
        second *= scale * tl.where(is_q, tl.load(q_gain + half + col), tl.load(k_gain + half + col)).to(tl.float32)
    if TURN:
        c = tl.load(cos + token * half + col)
        s = tl.load(sin + token * half + col)
        first, second = first * c - second * s, second * c + first * s
    to_q = q + token * H * K + head * K + col
    to_k = k + token * G * K + (head - H) * K + col
    tl.store(to_q, first.to(q.dtype.element_ty), mask=inside & (head < H))
    tl.store(to_q + half, second.to(q.dtype.element_ty), mask=inside & (head < H))
    tl.store(to_k, first.to(k.dtype.element_ty), mask=inside & (head >= H))
    tl.store(to_k + half, second.to(k.dtype.element_ty), mask=inside & (head >= H))


@triton.jit
def _backward(
    dq, dk, dv, dg, x, q_gain, k_gain, cos, sin, dx, parts_P2K, tokens, T, W, H, G, eps,
    dq_b, dq_t, dq_h, dk_b, dk_t, dk_h, dv_b, dv_t, dv_h,
    K: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, GATE: tl.constexpr, TURN: tl.constexpr, NORM: tl.constexpr,
    HAS_GATE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    one = tl.full((), 1, tl.int64)
    half: tl.constexpr = K // 2
    head = tl.arange(0, HEADS)[:, None]
    col = tl.arange(0, half)[None, :]
    inside = (head < H + G) & (col < half)
    is_q = head < H
    gain1 = tl.zeros((HEADS, half), tl.float32)
    gain2 = tl.zeros((HEADS, half), tl.float32)
    if NORM:
        gain1 = tl.where(is_q, tl.load(q_gain + col), tl.load(k_gain + col)).to(tl.float32)
        gain2 = tl.where(is_q, tl.load(q_gain + half + col), tl.load(k_gain + half + col)).to(tl.float32)
    d_gain1 = tl.zeros((HEADS, half), tl.float32)
    d_gain2 = tl.zeros((HEADS, half), tl.float32)
    for token in range(program, tokens, tl.num_programs(0)):
        row, b, t = one * token, one * (token // T), one * (token % T)
        from_q = dq + b * dq_b + t * dq_t + head * dq_h + col
        from_k = dk + b * dk_b + t * dk_t + (head - H) * dk_h + col
        g1 = tl.load(from_q, mask=inside & is_q, other=0.0).to(tl.float32)
        g2 = tl.load(from_q + half, mask=inside & is_q, other=0.0).to(tl.float32)
        g1 += tl.load(from_k, mask=inside & (head >= H), other=0.0).to(tl.float32)
        g2 += tl.load(from_k + half, mask=inside & (head >= H), other=0.0).to(tl.float32)
        if TURN:
            c = tl.load(cos + row * half + col)
            s = tl.load(sin + row * half + col)
            g1, g2 = g1 * c + g2 * s, g2 * c - g1 * s
        if NORM:
            base = x + row * W + head * K + col
            first = tl.load(base, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(base + half, mask=inside, other=0.0).to(tl.float32)
            square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
            scale = tl.rsqrt(square / K + eps)[:, None]
            first *= scale
            second *= scale
            d_gain1 += g1 * first
            d_gain2 += g2 * second
            g1 *= gain1
            g2 *= gain2
            along = ((tl.sum(g1 * first, 1) + tl.sum(g2 * second, 1)) / K)[:, None]
            g1 = scale * (g1 - first * along)
            g2 = scale * (g2 - second * along)
        to = dx + row * W + head * K + col
        tl.store(to, g1.to(dx.dtype.element_ty), mask=inside)
        tl.store(to + half, g2.to(dx.dtype.element_ty), mask=inside)
        # Values and gate pass through.
        flat = tl.arange(0, KV)
        value = tl.load(dv + b * dv_b + t * dv_t + (flat // K) * dv_h + flat % K, mask=flat < G * K)
        tl.store(dx + row * W + (H + G) * K + flat, value, mask=flat < G * K)
        if HAS_GATE:
            wide = tl.arange(0, GATE)
            value = tl.load(dg + row * H * K + wide, mask=wide < H * K)
            tl.store(dx + row * W + (H + 2 * G) * K + wide, value, mask=wide < H * K)
    if NORM:
        place = parts_P2K + one * program * 2 * K + tl.arange(0, half)
        tl.store(place, tl.sum(tl.where(is_q, d_gain1, 0.0), 0))
        tl.store(place + half, tl.sum(tl.where(is_q, d_gain2, 0.0), 0))
        tl.store(place + K, tl.sum(tl.where(is_q, 0.0, d_gain1), 0))
        tl.store(place + K + half, tl.sum(tl.where(is_q, 0.0, d_gain2), 0))


class SplitHeads(torch.autograd.Function):
    """(x [B, T, W], gains of q and k [K] or None, cos and sin [B, T, 1, K/2] or None) -> q, k, v, gate or None."""

    @staticmethod
    def forward(ctx, x_BTW, q_gain, k_gain, cos, sin, heads: int, kv_heads: int, head_dim: int, eps: float):
        x_BTW = x_BTW.contiguous()
        B, T, W = x_BTW.shape
        H, G, K = heads, kv_heads, head_dim
        q = torch.empty(B, T, H, K, dtype=x_BTW.dtype, device=x_BTW.device)
        k = torch.empty(B, T, G, K, dtype=x_BTW.dtype, device=x_BTW.device)
        turn, norm = cos is not None, q_gain is not None
        rows = power_of_two(H + G)
        _forward[(B * T,)](
            x_BTW, q_gain if norm else x_BTW, k_gain if norm else x_BTW, cos if turn else x_BTW,
            sin if turn else x_BTW, q, k, W, H, G, eps, K=K, HEADS=rows, TURN=turn, NORM=norm,
            num_warps=max(1, min(8, rows * K // 512)),
        )  # fmt: skip
        ctx.save_for_backward(x_BTW, q_gain, k_gain, cos, sin)
        ctx.sizes = H, G, K, eps
        v = x_BTW[..., (H + G) * K : (H + 2 * G) * K].unflatten(-1, (G, K))
        gate = x_BTW[..., (H + 2 * G) * K :] if (H + 2 * G) * K < W else None
        return q, k, v, gate

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        x_BTW, q_gain, k_gain, cos, sin = ctx.saved_tensors
        H, G, K, eps = ctx.sizes
        B, T, W = x_BTW.shape
        dq, dk, dv = (d if d.stride(-1) == 1 else d.contiguous() for d in d_outputs[:3])
        has_gate = (H + 2 * G) * K < W
        dg = d_outputs[3].contiguous() if has_gate else dq
        turn, norm = cos is not None, q_gain is not None
        num, rows = programs(x_BTW, B * T, per_processor=8), power_of_two(H + G)
        dx = torch.empty_like(x_BTW)
        parts_P2K = torch.empty(num, 2, K, dtype=torch.float32, device=x_BTW.device)
        _backward[(num,)](
            dq, dk, dv, dg, x_BTW, q_gain if norm else x_BTW, k_gain if norm else x_BTW, cos if turn else x_BTW,
            sin if turn else x_BTW, dx, parts_P2K, B * T, T, W, H, G, eps,
            *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
            K=K, HEADS=rows, KV=power_of_two(G * K), GATE=power_of_two(H * K), TURN=turn, NORM=norm,
            HAS_GATE=has_gate, num_warps=max(1, min(8, rows * K // 512)),
        )  # fmt: skip
        d_q_gain = d_k_gain = None
        if norm:
            gains_2K = parts_P2K.sum(0)
            d_q_gain, d_k_gain = gains_2K[0].to(q_gain.dtype), gains_2K[1].to(k_gain.dtype)
        return dx, d_q_gain, d_k_gain, None, None, None, None, None, None


@triton.jit
def _gate_forward(o, gate, out, T, HK, o_b, o_t, o_h, g_n, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    flat = tl.arange(0, BLOCK)
    inside = flat < HK
    place = o + token // T * o_b + token % T * o_t + flat // K * o_h + flat % K
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(tl.load(gate + token * g_n + flat, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + token * HK + flat, (value * share).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward(dy, o, gate, d_o, d_gate, T, HK, o_b, o_t, o_h, g_n, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    flat = tl.arange(0, BLOCK)
    inside = flat < HK
    place = o + token // T * o_b + token % T * o_t + flat // K * o_h + flat % K
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(tl.load(gate + token * g_n + flat, mask=inside, other=0.0).to(tl.float32))
    grad = tl.load(dy + token * HK + flat, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_o + token * HK + flat, (grad * share).to(d_o.dtype.element_ty), mask=inside)
    d_share = grad * value * share * (1 - share)
    tl.store(d_gate + token * HK + flat, d_share.to(d_gate.dtype.element_ty), mask=inside)


class GateHeads(torch.autograd.Function):
    """(o [B, T, H, K] of any layout, gate [B, T, H * K] with rows of any stride) -> o * sigmoid(gate) [B, T, H * K]."""

    @staticmethod
    def forward(ctx, o_BTHK: Tensor, gate: Tensor) -> Tensor:
        B, T, H, K = o_BTHK.shape
        o_BTHK = o_BTHK if o_BTHK.stride(-1) == 1 else o_BTHK.contiguous()
        gate = gate if gate.stride(-1) == 1 and gate.stride(0) == T * gate.stride(1) else gate.contiguous()
        out = torch.empty(B, T, H * K, dtype=o_BTHK.dtype, device=o_BTHK.device)
        block = power_of_two(H * K)
        _gate_forward[(B * T,)](
            o_BTHK, gate, out, T, H * K, *o_BTHK.stride()[:3], gate.stride(1), K=K, BLOCK=block,
            num_warps=max(1, min(8, block // 256)),
        )  # fmt: skip
        ctx.save_for_backward(o_BTHK, gate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        o_BTHK, gate = ctx.saved_tensors
        B, T, H, K = o_BTHK.shape
        d_o = torch.empty(B, T, H, K, dtype=o_BTHK.dtype, device=o_BTHK.device)
        d_gate = torch.empty(B, T, H * K, dtype=gate.dtype, device=gate.device)
        block = power_of_two(H * K)
        _gate_backward[(B * T,)](
            d_outputs[0].contiguous(), o_BTHK, gate, d_o, d_gate, T, H * K, *o_BTHK.stride()[:3], gate.stride(1),
            K=K, BLOCK=block, num_warps=max(1, min(8, block // 256)),
        )  # fmt: skip
        return d_o, d_gate
