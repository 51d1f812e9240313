"""The routed experts: sort tokens by expert, two matrix products per expert, weigh and add up the outputs.

`reference_experts` is the plain loop. The fast path is four steps that expert parallelism can take apart:
`sort_by_expert`, `permute`, `grouped_experts`, `combine`. None of them waits for a GPU.

`grouped_experts` runs `torch.nn.functional.grouped_mm` on CUDA and a loop of matrix products over the experts on a CPU.
grouped_mm also runs on a CPU, at the same speed forward; the loop wins because it keeps an expert's rows in the cache
between the products and the activation, and widens bfloat16 where the processor is slow at it (`ops/matmul.py`).

Suffixes as in `trinity.model`; R = N * k rows, one for each token and expert that meet, sorted by expert.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.base.errors import UserError
from trinity.ops import kernels
from trinity.ops.autograd import once_differentiable
from trinity.ops.fp8 import grouped_linear
from trinity.ops.matmul import widens
from trinity.ops.swiglu import reference_swiglu, swiglu, swiglu_gradient


class Order(NamedTuple):
    """How the rows of the experts follow from the tokens."""

    token_R: Tensor
    """int64: the token of each row."""
    row_Nk: Tensor
    """int64: the row of each token's j-th expert."""
    ends_E: Tensor
    """int32: one past the last row of each expert."""

    @property
    def counts_E(self) -> Tensor:
        """int64: rows of each expert."""
        return torch.diff(self.ends_E.long(), prepend=self.ends_E.new_zeros(1))


def reference_experts(
    x_ND: Tensor, indices_Nk: Tensor, weights_Nk: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """sum_j weights[n, j] * down_e(silu(gate_e x_n) * up_e x_n) with e = indices[n, j]; summed in fp32."""
    y_ND = torch.zeros_like(x_ND, dtype=torch.float32)
    for expert in range(gate_up_E2FD.shape[0]):
        tokens, slots = (indices_Nk == expert).nonzero(as_tuple=True)
        hidden = reference_swiglu(F.linear(x_ND[tokens], gate_up_E2FD[expert]))
        output = F.linear(hidden, down_EDF[expert])
        y_ND = y_ND.index_add(0, tokens, output.float() * weights_Nk[tokens, slots, None].float())
    return y_ND.to(x_ND.dtype)


def sort_by_expert(indices_Nk: Tensor, num_experts: int) -> Order:
    """The stable order by expert of all (token, expert) pairs; `indices_Nk` int64 in [0, num_experts)."""
    keys_R = indices_Nk.flatten()
    if keys_R.is_cuda and num_experts < 2**15:
        keys_R = keys_R.to(torch.int16)  # a radix sort takes a pass for each byte
    experts_R, pair_R = keys_R.sort(stable=True)
    row_R = torch.empty_like(pair_R).scatter_(0, pair_R, torch.arange(pair_R.numel(), device=pair_R.device))
    bins_E = torch.arange(num_experts, dtype=keys_R.dtype, device=pair_R.device)
    ends_E = torch.searchsorted(experts_R, bins_E, right=True, out_int32=True)
    return Order(pair_R // indices_Nk.shape[1], row_R.view_as(indices_Nk), ends_E)


def permute(x_ND: Tensor, order: Order) -> Tensor:
    """[R, D]: each token's vector once for each of its experts, sorted by expert."""
    if kernels.enabled(x_ND):
        return _GpuPermute.apply(x_ND, order.token_R, order.row_Nk)
    return _Permute.apply(x_ND, order.token_R, order.row_Nk)


def combine(y_RD: Tensor, weights_Nk: Tensor, order: Order) -> Tensor:
    """[N, D]: the weighted sum over each token's experts, in y's type, summed in fp32."""
    return _Combine.apply(y_RD, weights_Nk, order.token_R, order.row_Nk)


def grouped_experts(
    x_RD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ends_E: Tensor, *, fp8: bool = False
) -> Tensor:
    """SwiGLU of expert e on rows ends[e-1] .. ends[e]; every row must belong to an expert, ends[E-1] = R.

    `fp8`: with the products of `ops/fp8.py`. Raises UserError on CUDA when D or F is no multiple of 8 (grouped_mm wants
    strides of 16 bytes).
    """
    if fp8:
        return grouped_linear(swiglu(grouped_linear(x_RD, gate_up_E2FD, ends_E)), down_EDF, ends_E)
    if x_RD.device.type == "cpu":
        return _CpuExperts.apply(x_RD, gate_up_E2FD, down_EDF, tuple(ends_E.tolist()))
    _check_widths(x_RD, down_EDF)
    gate_up_R2F = F.grouped_mm(x_RD, gate_up_E2FD.transpose(1, 2), offs=ends_E)
    return F.grouped_mm(swiglu(gate_up_R2F), down_EDF.transpose(1, 2), offs=ends_E)


def experts_in_one(
    x_ND: Tensor, weights_Nk: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, order: Order, *, fp8: bool = False
) -> Tensor:
    """`combine(grouped_experts(permute(x)))` as one operation that keeps less; on CUDA, else those three.

    Raises UserError as `grouped_experts` does.
    """
    if not kernels.enabled(x_ND):
        y_RD = grouped_experts(permute(x_ND, order), gate_up_E2FD, down_EDF, order.ends_E, fp8=fp8)
        return combine(y_RD, weights_Nk, order)
    from trinity.ops.kernels.experts import Experts

    _check_widths(x_ND, down_EDF)
    return Experts.apply(x_ND, weights_Nk, gate_up_E2FD, down_EDF, *order, fp8)


def _check_widths(x: Tensor, down_EDF: Tensor) -> None:
    if x.shape[-1] % 8 or down_EDF.shape[-1] % 8:
        raise UserError(
            f"dim {x.shape[-1]} and expert_dim {down_EDF.shape[-1]} must be multiples of 8 on a GPU; "
            "change them or set runtime.kernels = 'reference'"
        )


def describe_experts(device: torch.device) -> str:
    """The path of the experts in a few words, for the log of a run."""
    if device.type == "cpu":
        return "loop of matrix products"
    return "grouped_mm, one node with Triton kernels (grouped_mm and compiled operations where blocks are compiled)"


class _Permute(torch.autograd.Function):
    """Row gather whose backward is a gather too (autograd's own would scatter with atomic adds)."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, token_R: Tensor, row_Nk: Tensor) -> Tensor:
        ctx.save_for_backward(row_Nk)
        return x_ND.index_select(0, token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        (d_RD,) = d_outputs
        (row_Nk,) = ctx.saved_tensors
        if d_RD.device.type == "cpu":
            return F.embedding_bag(row_Nk, d_RD, mode="sum"), None, None
        return d_RD.index_select(0, row_Nk.flatten()).view(*row_Nk.shape, -1).sum(dim=1), None, None


class _GpuPermute(torch.autograd.Function):
    """The same by Triton kernels, added up in fp32."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, token_R: Tensor, row_Nk: Tensor) -> Tensor:
        from trinity.ops.kernels.experts import gather_rows

        ctx.save_for_backward(row_Nk)
        return gather_rows(x_ND, token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        from trinity.ops.kernels.experts import add_up_rows

        return add_up_rows(d_outputs[0], ctx.saved_tensors[0]), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RD: Tensor, weights_Nk: Tensor, token_R: Tensor, row_Nk: Tensor) -> Tensor:
        ctx.save_for_backward(y_RD, weights_Nk, token_R, row_Nk)
        if y_RD.device.type == "cpu" and y_RD.dtype == torch.float32:
            return F.embedding_bag(row_Nk, y_RD, mode="sum", per_sample_weights=weights_Nk)
        y_NkD = y_RD.index_select(0, row_Nk.flatten()).view(*row_Nk.shape, -1)
        return (y_NkD * weights_Nk[:, :, None]).sum(dim=1).to(y_RD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        (d_ND,) = d_outputs
        y_RD, weights_Nk, token_R, row_Nk = ctx.saved_tensors
        d_RD = d_ND.index_select(0, token_R)
        weights_R = torch.empty_like(weights_Nk.flatten()).scatter_(0, row_Nk.flatten(), weights_Nk.flatten())
        d_weights_R = torch.linalg.vecdot(d_RD.float(), y_RD.float())
        d_weights_Nk = d_weights_R.index_select(0, row_Nk.flatten()).view_as(weights_Nk).to(weights_Nk.dtype)
        d_RD = d_RD.mul_(weights_R[:, None])
        return d_RD, d_weights_Nk, None, None


class _CpuExperts(torch.autograd.Function):
    """The loop, with gradients written into one buffer for all experts (autograd would add E buffers of that size)."""

    @staticmethod
    def forward(ctx, x_RD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ends: tuple[int, ...]) -> Tensor:
        assert ends[-1] == x_RD.shape[0], "rows without an expert"
        hidden_R2F = x_RD.new_empty(x_RD.shape[0], gate_up_E2FD.shape[1])
        open_RF = x_RD.new_empty(x_RD.shape[0], down_EDF.shape[2])
        y_RD = torch.empty_like(x_RD)
        wide = widens(x_RD)
        for expert, rows in _slices(ends):
            x, gate_up, down = (_widen(t, wide) for t in (x_RD[rows], gate_up_E2FD[expert], down_EDF[expert]))
            _multiply(x, gate_up.t(), hidden_R2F[rows])
            gate, up = _widen(hidden_R2F[rows], wide).chunk(2, dim=-1)
            open_gate = F.silu(gate)
            open_RF[rows] = open_gate
            _multiply(open_gate.mul_(up), down.t(), y_RD[rows])
        ctx.save_for_backward(x_RD, gate_up_E2FD, down_EDF, hidden_R2F, open_RF)
        ctx.ends = ends
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        (d_y_RD,) = d_outputs
        x_RD, gate_up_E2FD, down_EDF, hidden_R2F, open_RF = ctx.saved_tensors
        d_x_RD = torch.empty_like(x_RD)
        d_gate_up, d_down = torch.empty_like(gate_up_E2FD), torch.empty_like(down_EDF)
        wide = widens(x_RD)
        for expert, rows in _slices(ctx.ends):
            if rows.start == rows.stop:
                d_gate_up[expert].zero_()
                d_down[expert].zero_()
                continue
            x, d_y, hidden, open_gate = (_widen(t[rows], wide) for t in (x_RD, d_y_RD, hidden_R2F, open_RF))
            _multiply(d_y.t(), open_gate * hidden.chunk(2, dim=-1)[1], d_down[expert])
            d_act = d_y @ _widen(down_EDF[expert], wide)
            d_hidden = torch.empty_like(hidden)
            swiglu_gradient(d_act, hidden, open_gate, d_hidden)
            _multiply(d_hidden.t(), x, d_gate_up[expert])
            _multiply(d_hidden, _widen(gate_up_E2FD[expert], wide), d_x_RD[rows])
        return d_x_RD, d_gate_up, d_down, None


def _slices(ends: tuple[int, ...]) -> list[tuple[int, slice]]:
    """(expert, its rows) for each expert."""
    return [(expert, slice(start, end)) for expert, (start, end) in enumerate(itertools.pairwise((0, *ends)))]


def _widen(x: Tensor, wide: bool) -> Tensor:
    return x.float() if wide else x


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
