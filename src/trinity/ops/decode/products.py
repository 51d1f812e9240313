"""Products of one or a few rows with weight matrices [out, in], in bfloat16, float32 or FP8 blocks (`ops.block_fp8`).

`norm_project` and `gemv` serve few rows: a program has a tile of weight rows and one token, and its load of the weights
is under way while it computes what they are multiplied by. `project` serves many rows on tensor cores.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# (the checker takes Triton's language for Python)

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from trinity.ops.block_fp8 import dequantize_blocks
from trinity.ops.decode.rows import reference_add_norm

WIDEST = 4096
"""Channels that `norm_project` holds in registers."""


def reference_project(x_ND: Tensor, weight_CD: Tensor, scale: Tensor | None = None) -> Tensor:
    """x @ weight^T in float32."""
    weight = weight_CD.float() if scale is None else dequantize_blocks(weight_CD, scale)
    return F.linear(x_ND.float(), weight)


def reference_norm_project(
    x_ND: Tensor, y_ND: Tensor | None, post_D: Tensor | None, pre_D: Tensor, weight_CD: Tensor, eps: float,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(the product, x + RMS(y) * post, the normalised row): `rows.reference_add_norm`, then the product of its row."""
    x_ND, h_ND = reference_add_norm(x_ND, y_ND, post_D, pre_D, eps)
    return reference_project(h_ND, weight_CD, scale), x_ND, h_ND


@triton.jit
def norm_project_kernel(
    x, y, post, pre, weight, scale, out, x_out, h_out, num_out, eps,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    HAS_Y: tl.constexpr, HAS_SCALE: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BN * TILES
    row = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BD)
    inside = d < D
    n = first + tl.arange(0, BN)
    mask = (n < num_out)[:, None] & inside[None, :]
    w = tl.load(weight + n[:, None].to(tl.int64) * D + d[None, :], mask=mask, other=0.0)
    xv = tl.load(x + row * D + d, mask=inside, other=0.0).to(tl.float32)
    if HAS_Y:
        yv = tl.load(y + row * D + d, mask=inside, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(yv * yv, 0) / D + eps)
        xv += yv * factor * tl.load(post + d, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(xv * xv, 0) / D + eps)
    h = (xv * factor * tl.load(pre + d, mask=inside, other=0.0).to(tl.float32)).to(h_out.dtype.element_ty)
    if first == 0:
        tl.store(x_out + row * D + d, xv, mask=inside)
        tl.store(h_out + row * D + d, h, mask=inside)
    h = h.to(tl.float32)
    for tile in range(TILES):
        n = first + tile * BN + tl.arange(0, BN)
        if HAS_SCALE:
            s = tl.load(scale + (first + tile * BN) // 128 * SCALE_COLUMNS + d // 128, mask=inside, other=0.0)
            product = tl.sum(w.to(tl.float32) * (h * s)[None, :], 1)
        else:
            product = tl.sum(w.to(tl.float32) * h[None, :], 1)
        tl.store(out + row * num_out + n, product, mask=n < num_out)
        n += BN
        mask = ((n < num_out) & (tile + 1 < TILES))[:, None] & inside[None, :]
        w = tl.load(weight + n[:, None].to(tl.int64) * D + d[None, :], mask=mask, other=0.0)


def norm_project(
    x_ND: Tensor,
    y_ND: Tensor | None,
    post_D: Tensor | None,
    pre_D: Tensor,
    weight_CD: Tensor,
    eps: float,
    out_NC: Tensor,
    x_out_ND: Tensor,
    h_out_ND: Tensor,
    *,
    scale: Tensor | None = None,
    tiles: int = 1,
) -> None:
    """As `reference_norm_project`, into `out_NC` (float32), `x_out_ND` (float32, not `x_ND` itself) and `h_out_ND`."""
    N, D = x_ND.shape
    C = weight_CD.shape[0]
    BD = triton.next_power_of_2(D)
    assert BD <= WIDEST
    assert x_out_ND.data_ptr() != x_ND.data_ptr()
    BN = max(1, min(8192 // BD, triton.next_power_of_2(C)))
    norm_project_kernel[(triton.cdiv(C, BN * tiles), N)](
        x_ND, x_ND if y_ND is None else y_ND, pre_D if post_D is None else post_D, pre_D, weight_CD,
        pre_D if scale is None else scale, out_NC, x_out_ND, h_out_ND, C, eps,
        D=D, BD=BD, BN=BN, TILES=tiles, HAS_Y=y_ND is not None, HAS_SCALE=scale is not None,
        SCALE_COLUMNS=-(-D // 128), num_warps=4,
    )  # fmt: skip


@triton.jit
def gemv_kernel(
    x, weight, scale, out, num_out,
    C: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, SWIGLU: tl.constexpr,
    HAS_SCALE: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros([BN], tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = c < C
        mask = (n < num_out)[:, None] & inside[None, :]
        w = tl.load(weight + n[:, None].to(tl.int64) * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if SWIGLU:
            gate = tl.load(x + row * 2 * C + c, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(x + row * 2 * C + C + c, mask=inside, other=0.0).to(tl.float32)
            v = gate / (1 + tl.exp(-gate)) * up
        else:
            v = tl.load(x + row * C + c, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCALE:
            block = tl.program_id(0) * BN // 128
            v *= tl.load(scale + block * SCALE_COLUMNS + c // 128, mask=inside, other=0.0)
        total += tl.sum(w * v[None, :], 1)
    tl.store(out + row * num_out + n, total, mask=n < num_out)


def gemv(
    x: Tensor, weight_OC: Tensor, out_NO: Tensor, *, scale: Tensor | None = None, swiglu: bool = False
) -> None:  # fmt: skip
    """`reference_project` of x [N, C], or of SwiGLU of x [N, 2C], into `out_NO` (float32)."""
    O, C = weight_OC.shape
    BC = min(1024, triton.next_power_of_2(C))
    BN = min(8, triton.next_power_of_2(O))
    gemv_kernel[(triton.cdiv(O, BN), x.shape[0])](
        x, weight_OC, x if scale is None else scale, out_NO, O,
        C=C, BC=BC, BN=BN, SWIGLU=swiglu, HAS_SCALE=scale is not None, SCALE_COLUMNS=-(-C // 128), num_warps=4,
    )  # fmt: skip


@triton.jit
def project_kernel(
    x, weight, scale, out, num_rows, num_out,
    C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    HAS_SCALE: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = c < C
        v = tl.load(
            x + m[:, None].to(tl.int64) * C + c[None, :], mask=(m < num_rows)[:, None] & inside[None, :], other=0.0
        )
        w = tl.load(
            weight + n[:, None].to(tl.int64) * C + c[None, :], mask=(n < num_out)[:, None] & inside[None, :], other=0.0
        ).to(v.dtype)
        product = tl.dot(v, tl.trans(w), input_precision="ieee")
        if HAS_SCALE:  # BC is 128 and BN divides it: one scale for the whole tile
            product *= tl.load(scale + tl.program_id(0) * BN // 128 * SCALE_COLUMNS + start // 128)
        total += product
    mask = (m < num_rows)[:, None] & (n < num_out)[None, :]
    tl.store(out + m[:, None].to(tl.int64) * num_out + n[None, :], total.to(out.dtype.element_ty), mask=mask)


def project(x_NC: Tensor, weight_OC: Tensor, out_NO: Tensor, *, scale: Tensor | None = None) -> None:
    """`reference_project` into `out_NO`; x in the weights' type, or in bfloat16 where those are FP8."""
    N, C = x_NC.shape
    O = weight_OC.shape[0]
    BM = min(64, max(16, triton.next_power_of_2(N)))
    BN = 16 if O <= 4096 else 64
    BC = 128 if C > 64 else max(16, triton.next_power_of_2(C))
    project_kernel[(triton.cdiv(O, BN), triton.cdiv(N, BM))](
        x_NC, weight_OC, x_NC if scale is None else scale, out_NO, N, O,
        C=C, BM=BM, BC=BC, BN=BN, HAS_SCALE=scale is not None, SCALE_COLUMNS=-(-C // 128),
        num_warps=4, num_stages=4,
    )  # fmt: skip


@triton.jit
def best_kernel(
    logits, largest, place, total, limit,
    V: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    v = part * BV + tl.arange(0, BV)
    scores = tl.load(logits + row * V + v, mask=v < V, other=float("-inf"))
    allowed = tl.where(v < limit, scores, float("-inf"))
    top = tl.max(scores, 0)
    tl.store(total + row * PARTS + part, tl.sum(tl.exp(scores - top), 0))
    tl.store(largest + row * 2 * PARTS + part, top)
    tl.store(largest + (row * 2 + 1) * PARTS + part, tl.max(allowed, 0))
    # Of NaN logits no number is the best; it must be a token all the same, for it is the next step's input.
    tl.store(place + row * PARTS + part, tl.minimum(part * BV + tl.argmax(allowed, 0), limit - 1))


@triton.jit
def best_of_parts_kernel(largest, place, total, tokens, logprobs, PARTS: tl.constexpr, BP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BP)
    there = p < PARTS
    top = tl.load(largest + row * 2 * PARTS + p, mask=there, other=float("-inf"))
    best = tl.load(largest + (row * 2 + 1) * PARTS + p, mask=there, other=float("-inf"))
    peak = tl.max(top, 0)
    mass = tl.sum(tl.load(total + row * PARTS + p, mask=there, other=0.0) * tl.exp(top - peak), 0)
    winner = tl.minimum(tl.argmax(best, 0), PARTS - 1)
    tl.store(tokens + row, tl.load(place + row * PARTS + winner).to(tokens.dtype.element_ty))
    tl.store(logprobs + row, tl.max(best, 0) - peak - tl.log(mass))


def reference_best(logits_NV: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The most probable token below `limit` [N], and its log-probability among all."""
    tokens_N = logits_NV[:, :limit].argmax(-1)
    return tokens_N, logits_NV.float().log_softmax(-1).gather(1, tokens_N[:, None])[:, 0]


def best(logits_NV: Tensor, limit: int, tokens_N: Tensor, logprobs_N: Tensor) -> None:
    """As `reference_best`, into `tokens_N` (any integer type) and `logprobs_N` (float32)."""
    N, V = logits_NV.shape
    BV = min(4096, triton.next_power_of_2(V))
    parts = triton.cdiv(V, BV)
    largest = logits_NV.new_empty(N, 2, parts)
    total = logits_NV.new_empty(N, parts)
    place = torch.empty(N, parts, dtype=torch.int32, device=logits_NV.device)
    best_kernel[(parts, N)](logits_NV, largest, place, total, limit, V=V, BV=BV, PARTS=parts, num_warps=8)
    best_of_parts_kernel[(N,)](
        largest, place, total, tokens_N, logprobs_N, PARTS=parts, BP=triton.next_power_of_2(parts), num_warps=4
    )
