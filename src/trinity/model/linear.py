"""Matrices without bias, and the SwiGLU feed-forward network made of them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trinity.model.norm import Kernels
from trinity.ops import fp8
from trinity.ops.matmul import linear
from trinity.ops.remake import remade
from trinity.ops.swiglu import reference_swiglu, swiglu


class Linear(nn.Linear):
    """`x @ weight^T`. The weight is left unset: `Transformer.init_weights` or a checkpoint fills it."""

    def __init__(self, in_features: int, out_features: int, kernels: Kernels) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.kernels: Kernels = kernels
        self.fp8 = False
        """Products in FP8 (`ops/fp8.py`); set by `Transformer.use_fp8`."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        if self.fp8:
            return fp8.linear(input, self.weight)
        return linear(input, self.weight) if self.kernels == "fast" else F.linear(input, self.weight)


class FeedForward(nn.Module):
    """Dense SwiGLU: down(silu(gate x) * up x), gate and up fused in one matrix [2F, D], gate first."""

    def __init__(self, dim: int, hidden: int, kernels: Kernels) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden, kernels)
        self.down = Linear(hidden, dim, kernels)
        self.activation = swiglu if kernels == "fast" else reference_swiglu

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        hidden = self.gate_up(x)
        return self.down(remade(self.activation(hidden), self.activation, hidden))


class Embedding(nn.Embedding):
    """Token embedding; the weight is left unset, as in `Linear`."""

    def reset_parameters(self) -> None:
        pass


def empty_parameter(*shape: int) -> nn.Parameter:
    """An unset parameter on the default device and of the default type."""
    return nn.Parameter(torch.empty(*shape))
