"""Work on whole rows: residual and norms, queries and keys, the attention gate, choosing experts, SwiGLU.

Suffixes as in `trinity.model`; R = rows of expert outputs.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# (the checker takes Triton's language for Python)

import torch
import triton
import triton.language as tl
from torch import Tensor

from trinity.ops.rms_norm import reference_rms_norm


def reference_add_norm(
    x_ND: Tensor, y_ND: Tensor | None, post_D: Tensor | None, pre_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + RMS(y) * post in float32, RMS of that * pre in the type of `pre_D`); y None: x as it is."""
    x_ND = x_ND.float()
    if y_ND is not None:
        assert post_D is not None
        x_ND = x_ND + reference_rms_norm(y_ND.float(), post_D, eps)
    return x_ND, reference_rms_norm(x_ND, pre_D, eps).to(pre_D.dtype)


def reference_mix(out_RD: Tensor, rows_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
    """sum_j weights[n, j] * out[rows[n, j]] in float32: [N, D]."""
    return (out_RD[rows_Nk.long()].float() * weights_Nk[..., None]).sum(1)


@triton.jit
def add_norm_kernel(
    x, y, rows, weights, shared, post, pre, x_out, h_out, eps,
    D: tl.constexpr, BD: tl.constexpr, K: tl.constexpr,
    HAS_Y: tl.constexpr, MIX: tl.constexpr, SHARED: tl.constexpr, SHARED_STRIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    inside = d < D
    xv = tl.load(x + row * D + d, mask=inside, other=0.0).to(tl.float32)
    if HAS_Y:
        if MIX:
            yv = tl.zeros([BD], tl.float32)
            for j in tl.static_range(K):
                place = tl.load(rows + row * K + j).to(tl.int64)
                factor = tl.load(weights + row * K + j)
                yv += factor * tl.load(y + place * D + d, mask=inside, other=0.0).to(tl.float32)
            if SHARED:
                yv += tl.load(shared + row * SHARED_STRIDE + d, mask=inside, other=0.0).to(tl.float32)
        else:
            yv = tl.load(y + row * D + d, mask=inside, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(yv * yv, 0) / D + eps)
        xv += yv * factor * tl.load(post + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_out + row * D + d, xv, mask=inside)
    factor = tl.rsqrt(tl.sum(xv * xv, 0) / D + eps)
    h = xv * factor * tl.load(pre + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(h_out + row * D + d, h.to(h_out.dtype.element_ty), mask=inside)


def add_norm(
    x_ND: Tensor,
    y: Tensor | None,
    post_D: Tensor | None,
    pre_D: Tensor,
    eps: float,
    x_out_ND: Tensor,
    h_out_ND: Tensor,
    *,
    rows_Nk: Tensor | None = None,
    weights_Nk: Tensor | None = None,
    shared_ND: Tensor | None = None,
) -> None:
    """x_out = x + RMS(y) * post (float32), h_out = RMS(x_out) * pre.

    With `rows_Nk`, y are outputs of experts [R, D] and the sum of `weights` times those rows, plus `shared_ND`, is what
    is normalised (`reference_mix`). `x_out_ND` may be `x_ND`.
    """
    N, D = x_ND.shape
    mix = rows_Nk is not None
    BD = triton.next_power_of_2(D)
    add_norm_kernel[(N,)](
        x_ND, x_ND if y is None else y, rows_Nk if mix else x_ND, weights_Nk if mix else x_ND,
        x_ND if shared_ND is None else shared_ND, pre_D if post_D is None else post_D, pre_D, x_out_ND, h_out_ND, eps,
        D=D, BD=BD, K=rows_Nk.shape[1] if rows_Nk is not None else 1,
        HAS_Y=y is not None, MIX=mix, SHARED=shared_ND is not None,
        SHARED_STRIDE=D if shared_ND is None else shared_ND.stride(0), num_warps=4 if BD <= 1024 else 8,
    )  # fmt: skip


def reference_heads(
    qkvg_NC: Tensor, q_norm_K: Tensor, k_norm_K: Tensor, turn: tuple[Tensor, Tensor] | None, heads: tuple[int, int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [N, H, K], k and v [N, G, K] out of fused projections: normalised, then turned by (cos, sin) [N, K/2]."""
    H, G = heads
    K = q_norm_K.shape[0]
    q, k, v = qkvg_NC[:, : (H + 2 * G) * K].unflatten(-1, (-1, K)).split((H, G, G), dim=1)
    q, k = (reference_rms_norm(x.float(), w, eps) for x, w in ((q, q_norm_K), (k, k_norm_K)))
    if turn is not None:
        cos, sin = (x[:, None] for x in turn)
        q, k = (
            torch.cat((a * cos - b * sin, b * cos + a * sin), -1) for a, b in (x.chunk(2, -1) for x in (q, k))
        )  # fmt: skip
    return q, k, v


@triton.jit
def turned(source, norm, cos, sin, eps, K: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, TURN: tl.constexpr):
    """Both halves of one head at `source`, normalised and turned; cos and sin are pointers to the position's angles."""
    i = tl.arange(0, BH)
    inside = i < HALF
    a = tl.load(source + i, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + HALF + i, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / K + eps)
    a = a * factor * tl.load(norm + i, mask=inside, other=0.0).to(tl.float32)
    b = b * factor * tl.load(norm + HALF + i, mask=inside, other=0.0).to(tl.float32)
    if TURN:
        c = tl.load(cos + i, mask=inside, other=1.0)
        s = tl.load(sin + i, mask=inside, other=0.0)
        a, b = a * c - b * s, b * c + a * s
    return a, b


@triton.jit
def heads_kernel(
    qkvg, q_norm, k_norm, cos, sin, places, q_out, k_out, v_out, k_cache, v_cache, eps,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BH: tl.constexpr, WIDTH: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = K // 2
    i = tl.arange(0, BH)
    inside = i < HALF
    source = qkvg + row * WIDTH + head * K
    if head < H:
        a, b = turned(source, q_norm, cos + row * HALF, sin + row * HALF, eps, K, HALF, BH, TURN)
        target = q_out + (row * H + head) * K
        tl.store(target + i, a.to(q_out.dtype.element_ty), mask=inside)
        tl.store(target + HALF + i, b.to(q_out.dtype.element_ty), mask=inside)
    else:
        g = head - H
        a, b = turned(source, k_norm, cos + row * HALF, sin + row * HALF, eps, K, HALF, BH, TURN)
        target = k_out + (row * G + g) * K
        tl.store(target + i, a.to(k_out.dtype.element_ty), mask=inside)
        tl.store(target + HALF + i, b.to(k_out.dtype.element_ty), mask=inside)
        va = tl.load(source + G * K + i, mask=inside, other=0.0).to(tl.float32)
        vb = tl.load(source + G * K + HALF + i, mask=inside, other=0.0).to(tl.float32)
        target = v_out + (row * G + g) * K
        tl.store(target + i, va.to(v_out.dtype.element_ty), mask=inside)
        tl.store(target + HALF + i, vb.to(v_out.dtype.element_ty), mask=inside)
        place = tl.load(places + row)
        if place >= 0:
            offset = (place * G + g) * K + i
            tl.store(k_cache + offset, a.to(k_cache.dtype.element_ty), mask=inside)
            tl.store(k_cache + offset + HALF, b.to(k_cache.dtype.element_ty), mask=inside)
            tl.store(v_cache + offset, va.to(v_cache.dtype.element_ty), mask=inside)
            tl.store(v_cache + offset + HALF, vb.to(v_cache.dtype.element_ty), mask=inside)


def heads_to_cache(
    qkvg_NC: Tensor,
    q_norm_K: Tensor,
    k_norm_K: Tensor,
    turn: tuple[Tensor, Tensor] | None,
    heads: tuple[int, int],
    eps: float,
    places_N: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference_heads`, in qkvg's type; keys and values are also written to the cache at `places_N` (-1: not)."""
    N, width = qkvg_NC.shape
    H, G = heads
    K = q_norm_K.shape[0]
    q, k, v = (qkvg_NC.new_empty(N, count, K) for count in (H, G, G))
    cos, sin = turn if turn is not None else (q_norm_K, q_norm_K)
    heads_kernel[(N, H + G)](
        qkvg_NC, q_norm_K, k_norm_K, cos, sin, places_N, q, k, v, k_cache, v_cache, eps,
        H=H, G=G, K=K, BH=triton.next_power_of_2(K // 2), WIDTH=width, TURN=turn is not None, num_warps=1,
    )  # fmt: skip
    return q, k, v


@triton.jit
def gate_kernel(x, qkvg, out, width, offset, C: tl.constexpr, BC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    xv = tl.load(x + row * C + c, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(qkvg + row * width + offset + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * C + c, (xv / (1 + tl.exp(-gate))).to(out.dtype.element_ty), mask=inside)


def gate_rows(x_NC: Tensor, qkvg_NW: Tensor) -> Tensor:
    """x * sigmoid(gate), the gate being the last C columns of the fused projections; as `ops.gate.reference_gated`."""
    N, C = x_NC.shape
    width = qkvg_NW.shape[1]
    out = torch.empty_like(x_NC)
    gate_kernel[(N, triton.cdiv(C, 1024))](x_NC, qkvg_NW, out, width, width - C, C=C, BC=1024, num_warps=4)
    return out


@triton.jit
def swiglu_kernel(x, out, F: tl.constexpr, BF: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = f < F
    gate = tl.load(x + row * 2 * F + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * F + F + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * F + f, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


def swiglu_rows(gate_up_R2F: Tensor) -> Tensor:
    """As `ops.swiglu.reference_swiglu`, rounded once."""
    R, F = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    out = gate_up_R2F.new_empty(R, F)
    if R:
        BF = min(1024, triton.next_power_of_2(F))
        swiglu_kernel[(R, triton.cdiv(F, BF))](gate_up_R2F, out, F=F, BF=BF, num_warps=1 if BF <= 256 else 4)
    return out


def reference_choose(logits_NE: Tensor, bias_E: Tensor, k: int, norm: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Experts [N, k] by falling biased score, and their factors, as `model.router.Router`."""
    scores_NE = logits_NE.float().sigmoid()
    indices_Nk = (scores_NE + bias_E).topk(k, dim=-1).indices
    weights_Nk = scores_NE.gather(1, indices_Nk)
    if norm:
        weights_Nk = weights_Nk / (weights_Nk.sum(-1, keepdim=True) + 1e-20)
    return indices_Nk, weights_Nk * scale


@triton.jit
def ranked(logits, bias, row, E: tl.constexpr, BE: tl.constexpr):
    """Scores [BE] of a row, and each expert's rank by biased score: of equal ones the lower number comes first."""
    i = tl.arange(0, BE)
    there = i < E
    scores = 1 / (1 + tl.exp(-tl.load(logits + row * E + i, mask=there, other=0.0)))
    biased = tl.where(there, scores + tl.load(bias + i, mask=there, other=0.0), float("-inf"))
    mine = tl.expand_dims(biased, 1)
    other = tl.expand_dims(biased, 0)
    before = (other > mine) | ((other == mine) & (tl.expand_dims(i, 0) < tl.expand_dims(i, 1)))
    return scores, tl.sum(before.to(tl.int32), 1)


@triton.jit
def choose_kernel(
    logits, bias, slots, indices, weights, factor,
    E: tl.constexpr, BE: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BE)
    scores, rank = ranked(logits, bias, row, E, BE)
    chosen = rank < K
    if NORM:
        factor = factor / (tl.sum(tl.where(chosen, scores, 0.0), 0) + 1e-20)
    expert = i
    if MASKED:
        expert = tl.where(tl.load(slots + row) >= 0, i, -1)
    tl.store(indices + row * K + rank, expert, mask=chosen)
    tl.store(weights + row * K + rank, scores * factor, mask=chosen)


def choose(
    logits_NE: Tensor,
    bias_E: Tensor,
    norm: bool,
    scale: float,
    indices_Nk: Tensor,
    weights_Nk: Tensor,
    slots_N: Tensor | None = None,
) -> None:
    """As `reference_choose`, into `indices_Nk` (int32) and `weights_Nk`; rows with a negative slot choose expert -1."""
    N, E = logits_NE.shape
    choose_kernel[(N,)](
        logits_NE, bias_E, indices_Nk if slots_N is None else slots_N, indices_Nk, weights_Nk, scale,
        E=E, BE=triton.next_power_of_2(E), K=indices_Nk.shape[1], NORM=norm, MASKED=slots_N is not None, num_warps=4,
    )  # fmt: skip
