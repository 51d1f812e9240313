"""Routed experts of one or a few tokens: an expert's weights are read once, gathered by its number on the device.

Few tokens: one program for a tile of one chosen expert of one token; experts that tokens share are read again, from the
cache. Many tokens: one program for a tile of an expert and all tokens, of which those that did not choose it count as
zero, on tensor cores; an expert that nobody chose is not read. The shared expert is the one after the routed ones.

P = N * (k + shared) outputs of experts, row n * (k + shared) + j for the j-th expert of token n.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# (the checker takes Triton's language for Python)

import torch
import triton
import triton.language as tl
from torch import Tensor

from trinity.ops.decode.rows import ranked, reference_choose
from trinity.ops.swiglu import reference_swiglu


def reference_outputs(
    h_ND: Tensor, indices_Nk: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, shared: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Every chosen expert's output and the shared one's, unweighed, in float32: [N, k + shared, D]."""
    outputs = []
    for h_D, indices_k in zip(h_ND.float(), indices_Nk.long(), strict=True):
        row = [down_EDF[e].float() @ reference_swiglu(gate_up_E2FD[e].float() @ h_D) for e in indices_k]
        if shared is not None:
            row.append(shared[1].float() @ reference_swiglu(shared[0].float() @ h_D))
        outputs.append(torch.stack(row))
    return torch.stack(outputs)


def reference_few(
    logits_NE: Tensor, bias_E: Tensor, k: int, norm: bool, scale: float, h_ND: Tensor, gate_up_E2FD: Tensor,
    down_EDF: Tensor, shared: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """The whole layer: [N, D] float32."""
    indices_Nk, weights_Nk = reference_choose(logits_NE, bias_E, k, norm, scale)
    outputs = reference_outputs(h_ND, indices_Nk, gate_up_E2FD, down_EDF, shared)
    y_ND = (outputs[:, :k] * weights_Nk[..., None]).sum(1)
    return y_ND if shared is None else y_ND + outputs[:, k]


@triton.jit
def few_up_kernel(
    logits, bias, h, gate_up, gate_up_scale, shared, shared_scale, act, indices, weights, factor,
    E: tl.constexpr, BE: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, NORM: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, FS: tl.constexpr, BF: tl.constexpr, FMAX: tl.constexpr,
    HAS_SCALE: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    slot = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BD)
    inside = d < D
    f = tile * BF + tl.arange(0, BF)
    if slot < K:
        scores, rank = ranked(logits, bias, row, E, BE)
        i = tl.arange(0, BE)
        # NaN logits have no ranks; the number stays inside the weights, and the row is NaN anyway.
        expert = tl.minimum(tl.sum(tl.where(rank == slot, i, 0), 0), E - 1)
        if tile == 0:
            if NORM:
                factor = factor / (tl.sum(tl.where(rank < K, scores, 0.0), 0) + 1e-20)
            tl.store(indices + row * K + slot, expert)
            tl.store(weights + row * K + slot, tl.sum(tl.where(rank == slot, scores, 0.0), 0) * factor)
        base = gate_up + expert.to(tl.int64) * 2 * F * D
        base_scale = gate_up_scale + expert * (2 * F // 128) * SCALE_COLUMNS
        width = F
    else:
        base = shared
        base_scale = shared_scale
        width = FS
    mask = (f < width)[:, None] & inside[None, :]
    gate = tl.load(base + f[:, None] * D + d[None, :], mask=mask, other=0.0)
    up = tl.load(base + (width + f)[:, None] * D + d[None, :], mask=mask, other=0.0)
    v = tl.load(h + row * D + d, mask=inside, other=0.0).to(tl.float32)
    vg, vu = v, v
    if HAS_SCALE:
        vg = v * tl.load(base_scale + tile * BF // 128 * SCALE_COLUMNS + d // 128, mask=inside, other=0.0)
        vu = v * tl.load(base_scale + (width + tile * BF) // 128 * SCALE_COLUMNS + d // 128, mask=inside, other=0.0)
    g = tl.sum(gate.to(tl.float32) * vg[None, :], 1)
    u = tl.sum(up.to(tl.float32) * vu[None, :], 1)
    out = act + (row * (K + SHARED) + slot) * FMAX
    tl.store(out + f, g / (1 + tl.exp(-g)) * u, mask=f < width)


@triton.jit
def down_rows(
    d, base, base_scale, act,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """Rows d [BD] of one expert's down matrix [D, F] times one row of activations."""
    total = tl.zeros([BD], tl.float32)
    for start in tl.static_range(0, F, BF):
        f = start + tl.arange(0, BF)
        inside = f < F
        mask = (d < D)[:, None] & inside[None, :]
        w = tl.load(base + d[:, None] * F + f[None, :], mask=mask, other=0.0).to(tl.float32)
        v = tl.load(act + f, mask=inside, other=0.0)
        if HAS_SCALE:
            v *= tl.load(base_scale + f // 128, mask=inside, other=0.0)
        total += tl.sum(w * v[None, :], 1)
    return total


@triton.jit
def few_down_kernel(
    act, indices, weights, down, down_scale, shared, shared_scale, y,
    K: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, FS: tl.constexpr,
    BF: tl.constexpr, FMAX: tl.constexpr, HAS_SCALE: tl.constexpr, SC: tl.constexpr, SCS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    d = tile * BD + tl.arange(0, BD)
    total = tl.zeros([BD], tl.float32)
    block = tile * BD // 128
    for slot in tl.static_range(K):
        expert = tl.load(indices + row * K + slot)
        factor = tl.load(weights + row * K + slot)
        base = down + expert.to(tl.int64) * D * F
        base_scale = down_scale + (expert * ((D + 127) // 128) + block) * SC
        total += factor * down_rows(
            d, base, base_scale, act + (row * (K + SHARED) + slot) * FMAX, D, BD, F, BF, HAS_SCALE
        )
    if SHARED:
        base_scale = shared_scale + block * SCS
        total += down_rows(d, shared, base_scale, act + (row * (K + SHARED) + K) * FMAX, D, BD, FS, BF, HAS_SCALE)
    tl.store(y + row * D + d, total, mask=d < D)


class ExpertWeights:
    """Matrices of a layer's experts as the kernels read them; scales where they are FP8 blocks."""

    def __init__(
        self,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        shared: tuple[Tensor, Tensor] | None,
        scales: tuple[Tensor, ...] | None = None,
    ) -> None:
        self.gate_up, self.down = gate_up_E2FD, down_EDF
        self.E, self.D, self.F = down_EDF.shape
        self.shared = shared
        self.num_shared = int(shared is not None)
        self.shared_up, self.shared_down = shared if shared is not None else (gate_up_E2FD, down_EDF)
        self.FS = shared[1].shape[1] if shared is not None else self.F
        self.FMAX = max(self.F, self.FS)
        """Width of a row of activations."""
        self.scaled = scales is not None
        none = gate_up_E2FD
        self.scales = scales if scales is not None else (none, none, none, none)
        """Of gate_up, down, and the shared expert's two."""


def few_experts(
    logits_NE: Tensor,
    bias_E: Tensor,
    norm: bool,
    scale: float,
    h_ND: Tensor,
    w: ExpertWeights,
    act: Tensor,
    indices_Nk: Tensor,
    weights_Nk: Tensor,
    y_ND: Tensor,
) -> None:
    """As `reference_few`, into `y_ND` (float32); `act` float32 [N, k + shared, FMAX] is room for the activations."""
    N, k = indices_Nk.shape
    BD = triton.next_power_of_2(w.D)
    BF = max(1, min(8192 // BD, triton.next_power_of_2(w.FMAX)))
    up, down, shared_up, shared_down = w.scales
    columns = -(-w.D // 128)
    few_up_kernel[(triton.cdiv(w.FMAX, BF), k + w.num_shared, N)](
        logits_NE, bias_E, h_ND, w.gate_up, up, w.shared_up, shared_up, act, indices_Nk, weights_Nk, scale,
        E=w.E, BE=triton.next_power_of_2(w.E), K=k, SHARED=w.num_shared, NORM=norm, D=w.D, BD=BD, F=w.F, FS=w.FS,
        BF=BF, FMAX=w.FMAX, HAS_SCALE=w.scaled, SCALE_COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    tile = min(4, triton.next_power_of_2(w.D))
    few_down_kernel[(triton.cdiv(w.D, tile), N)](
        act, indices_Nk, weights_Nk, w.down, down, w.shared_down, shared_down, y_ND,
        K=k, SHARED=w.num_shared, D=w.D, BD=tile, F=w.F, FS=w.FS, BF=min(1024, triton.next_power_of_2(w.FMAX)),
        FMAX=w.FMAX, HAS_SCALE=w.scaled, SC=-(-w.F // 128), SCS=-(-w.FS // 128), num_warps=4,
    )  # fmt: skip


@triton.jit
def many_up_kernel(
    h, indices, gate_up, gate_up_scale, shared, shared_scale, act, num_rows,
    E: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    F: tl.constexpr, FS: tl.constexpr, BF: tl.constexpr, FMAX: tl.constexpr, BM: tl.constexpr,
    HAS_SCALE: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    expert = tl.program_id(1)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    j = tl.arange(0, BK)
    mask = (m < num_rows)[:, None] & (j < K)[None, :]
    hit = (tl.load(indices + m[:, None] * K + j[None, :], mask=mask, other=-1) == expert) & mask
    slot = tl.sum(tl.where(hit, j[None, :], 0), 1)
    chosen = tl.sum(hit.to(tl.int32), 1) > 0
    base = gate_up + expert.to(tl.int64) * 2 * F * D
    base_scale = gate_up_scale + expert * (2 * F // 128) * SCALE_COLUMNS
    width = F
    if SHARED:  # noqa: SIM102 (a constant of the compilation, then a number on the device)
        if expert == E:
            base = shared
            base_scale = shared_scale
            width = FS
            slot = tl.full([BM], K, tl.int32)
            chosen = m < num_rows
    if (tl.sum(chosen.to(tl.int32), 0) > 0) & (tile * BF < width):
        f = tile * BF + tl.arange(0, BF)
        g = tl.zeros([BM, BF], tl.float32)
        u = tl.zeros([BM, BF], tl.float32)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            inside = d < D
            v = tl.load(h + m[:, None].to(tl.int64) * D + d[None, :], mask=chosen[:, None] & inside[None, :], other=0.0)
            rows = (f < width)[:, None] & inside[None, :]
            gate = tl.load(base + f[:, None] * D + d[None, :], mask=rows, other=0.0).to(v.dtype)
            up = tl.load(base + (width + f)[:, None] * D + d[None, :], mask=rows, other=0.0).to(v.dtype)
            if HAS_SCALE:  # BD is 128 and BF divides it
                sg = tl.load(base_scale + tile * BF // 128 * SCALE_COLUMNS + start // 128)
                su = tl.load(base_scale + (width + tile * BF) // 128 * SCALE_COLUMNS + start // 128)
                g += tl.dot(v, tl.trans(gate), input_precision="ieee") * sg
                u += tl.dot(v, tl.trans(up), input_precision="ieee") * su
            else:
                g = tl.dot(v, tl.trans(gate), g, input_precision="ieee")
                u = tl.dot(v, tl.trans(up), u, input_precision="ieee")
        out = act + (m.to(tl.int64) * (K + SHARED) + slot)[:, None] * FMAX + f[None, :]
        value = (g / (1 + tl.exp(-g)) * u).to(act.dtype.element_ty)
        tl.store(out, value, mask=chosen[:, None] & (f < width)[None, :])


@triton.jit
def many_down_kernel(
    act, indices, down, down_scale, shared, shared_scale, out, num_rows,
    E: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    F: tl.constexpr, FS: tl.constexpr, BF: tl.constexpr, FMAX: tl.constexpr, BM: tl.constexpr,
    HAS_SCALE: tl.constexpr, SC: tl.constexpr, SCS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    expert = tl.program_id(1)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    j = tl.arange(0, BK)
    mask = (m < num_rows)[:, None] & (j < K)[None, :]
    hit = (tl.load(indices + m[:, None] * K + j[None, :], mask=mask, other=-1) == expert) & mask
    slot = tl.sum(tl.where(hit, j[None, :], 0), 1)
    chosen = tl.sum(hit.to(tl.int32), 1) > 0
    base = down + expert.to(tl.int64) * D * F
    base_scale = down_scale + expert * ((D + 127) // 128) * SC + tile * BD // 128 * SC
    width = F
    if SHARED:  # noqa: SIM102 (a constant of the compilation, then a number on the device)
        if expert == E:
            base = shared
            base_scale = shared_scale + tile * BD // 128 * SCS
            width = FS
            slot = tl.full([BM], K, tl.int32)
            chosen = m < num_rows
    if tl.sum(chosen.to(tl.int32), 0) > 0:
        d = tile * BD + tl.arange(0, BD)
        rows = m.to(tl.int64) * (K + SHARED) + slot
        total = tl.zeros([BM, BD], tl.float32)
        for start in range(0, width, BF):
            f = start + tl.arange(0, BF)
            inside = f < width
            v = tl.load(act + rows[:, None] * FMAX + f[None, :], mask=chosen[:, None] & inside[None, :], other=0.0)
            w = tl.load(base + d[:, None] * width + f[None, :], mask=(d < D)[:, None] & inside[None, :], other=0.0).to(
                v.dtype
            )
            product = tl.dot(v, tl.trans(w), input_precision="ieee")
            if HAS_SCALE:
                product *= tl.load(base_scale + start // 128)
            total += product
        tl.store(
            out + rows[:, None] * D + d[None, :],
            total.to(out.dtype.element_ty),
            mask=chosen[:, None] & (d < D)[None, :],
        )


def many_experts(h_ND: Tensor, indices_Nk: Tensor, w: ExpertWeights, act: Tensor, out_PD: Tensor) -> None:
    """As `reference_outputs`, into `out_PD`; `act` [P, FMAX] in h's type is room for the activations.

    Rows of tokens whose experts are -1 stay as they are.
    """
    N, k = indices_Nk.shape
    BM = min(64, max(16, triton.next_power_of_2(N)))
    BK = triton.next_power_of_2(k)
    up, down, shared_up, shared_down = w.scales
    experts = w.E + w.num_shared
    BD = 128 if w.D > 64 else max(16, triton.next_power_of_2(w.D))
    BF = 32 if w.FMAX >= 32 else 16
    many_up_kernel[(triton.cdiv(w.FMAX, BF), experts, triton.cdiv(N, BM))](
        h_ND, indices_Nk, w.gate_up, up, w.shared_up, shared_up, act, N,
        E=w.E, K=k, BK=BK, SHARED=w.num_shared, D=w.D, BD=BD, F=w.F, FS=w.FS, BF=BF, FMAX=w.FMAX, BM=BM,
        HAS_SCALE=w.scaled, SCALE_COLUMNS=-(-w.D // 128), num_warps=4, num_stages=4,
    )  # fmt: skip
    tile = 64 if w.D >= 64 else 16
    many_down_kernel[(triton.cdiv(w.D, tile), experts, triton.cdiv(N, BM))](
        act, indices_Nk, w.down, down, w.shared_down, shared_down, out_PD, N,
        E=w.E, K=k, BK=BK, SHARED=w.num_shared, D=w.D, BD=tile, F=w.F, FS=w.FS,
        BF=128 if w.FMAX > 64 else max(16, triton.next_power_of_2(w.FMAX)), FMAX=w.FMAX, BM=BM,
        HAS_SCALE=w.scaled, SC=-(-w.F // 128), SCS=-(-w.FS // 128), num_warps=4, num_stages=3,
    )  # fmt: skip
