"""Matrix products in FP8 for training: e4m3 with one float32 scale for each row of either factor.

`linear` and `grouped_linear` compute x @ W^T and the gradient of x so; the gradient of W stays a product of what was
given, in its type, because its sums run over thousands of tokens and feed the optimizer. Rows are scaled to e4m3's
largest number by their own largest magnitude (Micikevicius et al. 2022, arXiv 2209.05433; which products stay in high
precision after torchao's recipe "rowwise with gradient of the weight in high precision").

On CUDA (compute capability 9.0 or more) the products are torch's scaled ones. Elsewhere they are simulated: the same
quantised numbers, multiplied in float32. `scaled_product` is the one place where the two differ.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.base.errors import UserError
from trinity.ops import kernels
from trinity.ops.autograd import once_differentiable
from trinity.ops.block_fp8 import E4M3_MAX

MULTIPLE = 16
"""Widths must be multiples of this on CUDA: rows of e4m3 begin at multiples of 16 bytes."""


class Scaled:
    """A quantised tensor: `values` e4m3 [..., X], `scales` float32 [...], value = stored * scale of its row."""

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        self.values, self.scales = values, scales

    def wide(self) -> Tensor:
        """float32, what the stored numbers mean."""
        return self.values.float() * self.scales[..., None]


def reference_quantize_rows(x: Tensor) -> Scaled:
    """[..., X] -> e4m3 of the same shape with a scale for each row; rows of zeros have the scale 1."""
    largest = x.detach().float().abs().amax(-1)
    scales = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    values = (x.detach().float() / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    return Scaled(values.to(torch.float8_e4m3fn), scales)


def quantize_rows(x: Tensor) -> Scaled:
    """As the reference, on CUDA in one pass over memory."""
    if not kernels.enabled(x):
        return reference_quantize_rows(x)
    from trinity.ops.kernels.fp8 import quantize_rows as by_kernel

    return Scaled(*by_kernel(x))


def quantize_columns(weight: Tensor) -> Scaled:
    """[..., X, Y] -> the rows of its transpose: e4m3 [..., Y, X] and scales [..., Y]."""
    if not kernels.enabled(weight):
        return reference_quantize_rows(weight.transpose(-1, -2).contiguous())
    from trinity.ops.kernels.fp8 import quantize_columns as by_kernel

    return Scaled(*by_kernel(weight))


def scaled_product(a: Scaled, b: Scaled, dtype: torch.dtype, ends_E: Tensor | None = None) -> Tensor:
    """a @ b^T in `dtype`: [N, X] and [Y, X] -> [N, Y], or grouped: [R, X] and [E, Y, X] -> [R, Y], where rows
    ends[e-1] .. ends[e] meet the matrix e."""
    if a.values.is_cuda:
        return _by_tensor_cores(a, b, dtype, ends_E)
    if ends_E is None:
        return (a.wide() @ b.wide().t()).to(dtype)
    out = torch.empty(a.values.shape[0], b.values.shape[1], dtype=dtype)
    wide_a, wide_b = a.wide(), b.wide()
    for expert, rows in _slices(ends_E):
        out[rows] = (wide_a[rows] @ wide_b[expert].t()).to(dtype)
    return out


def _by_tensor_cores(a: Scaled, b: Scaled, dtype: torch.dtype, ends_E: Tensor | None) -> Tensor:
    rowwise = F.ScalingType.RowWise
    columns = b.values.transpose(-1, -2)
    if ends_E is None:
        scales = a.scales[:, None], b.scales[None, :]
        return F.scaled_mm(a.values, columns, scales[0], rowwise, scales[1], rowwise, output_dtype=dtype)
    return F.scaled_grouped_mm(  # pyright: ignore[reportAttributeAccessIssue]
        a.values, columns, a.scales, rowwise, b.scales, rowwise, offs=ends_E, output_dtype=dtype, use_fast_accum=True
    )


def linear(x: Tensor, weight_FD: Tensor) -> Tensor:
    """x @ weight^T; any leading dimensions."""
    return _Linear.apply(x, weight_FD)


def grouped_linear(x_RD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """[R, F]: rows ends[e-1] .. ends[e] times the transpose of matrix e; ends[E-1] must be R."""
    return _GroupedLinear.apply(x_RD, weight_EFD, ends_E)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_FD: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_FD)
        y_NF = scaled_product(quantize_rows(x.flatten(0, -2)), quantize_rows(weight_FD), x.dtype)
        return y_NF.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        x, weight_FD = ctx.saved_tensors
        d_NF = d_outputs[0].flatten(0, -2)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = scaled_product(quantize_rows(d_NF), quantize_columns(weight_FD), x.dtype).view_as(x)
        if ctx.needs_input_grad[1]:
            dw = d_NF.t() @ x.flatten(0, -2)
        return dx, dw


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_RD, weight_EFD, ends_E)
        return scaled_product(quantize_rows(x_RD), quantize_rows(weight_EFD), x_RD.dtype, ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        x_RD, weight_EFD, ends_E = ctx.saved_tensors
        d_RF = d_outputs[0].contiguous()
        dx = scaled_product(quantize_rows(d_RF), quantize_columns(weight_EFD), x_RD.dtype, ends_E)
        return dx, grouped_weight_gradient(d_RF, x_RD, ends_E), None


def grouped_weight_gradient(d_RF: Tensor, x_RD: Tensor, ends_E: Tensor) -> Tensor:
    """[E, F, D]: for each expert d^T @ x over its rows, in the type given."""
    if d_RF.is_cuda:
        return F.grouped_mm(d_RF.t(), x_RD, offs=ends_E)
    out = x_RD.new_zeros(ends_E.shape[0], d_RF.shape[1], x_RD.shape[1])
    for expert, rows in _slices(ends_E):
        out[expert] = d_RF[rows].t() @ x_RD[rows]
    return out


def _slices(ends_E: Tensor) -> list[tuple[int, slice]]:
    pairs = itertools.pairwise([0, *ends_E.tolist()])
    return [(expert, slice(start, end)) for expert, (start, end) in enumerate(pairs)]


def check(device: torch.device, widths: dict[str, int]) -> None:
    """Raises UserError where the device has no FP8 products or a width, by the name of its setting, does not fit."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (9, 0):
        raise UserError(
            f"runtime.fp8 needs a GPU of compute capability 9.0 (Hopper) or later, and the "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}: use runtime.fp8=false"
        )
    for name, width in widths.items():
        if width % MULTIPLE:
            raise UserError(
                f"runtime.fp8 on a GPU needs {name} to be a multiple of {MULTIPLE}, and it is {width}: change it or "
                "use runtime.fp8=false"
            )


def describe(device: torch.device) -> str:
    """For the log of a run."""
    how = "e4m3 with a scale a row, forward and input gradients; weight gradients, router and head as they were"
    return how if device.type == "cuda" else f"simulated {how}"
