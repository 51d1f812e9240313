"""RMSNorm as a module."""

from typing import Literal

import torch
from torch import Tensor, nn

from trinity.ops.rms_norm import reference_rms_norm, rms_norm

Kernels = Literal["fast", "reference"]


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension with a learnable gain that starts at `gain`."""

    def __init__(self, dim: int, eps: float, kernels: Kernels, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), gain))
        self.eps = eps
        self.gain = gain
        self.kernels: Kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]"""
        norm = rms_norm if self.kernels == "fast" else reference_rms_norm
        return norm(x, self.weight, self.eps)
