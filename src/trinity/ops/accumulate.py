"""Adding a low-precision gradient to a float32 one."""

import torch
from torch import Tensor

from trinity.ops import kernels


def reference_accumulate_(total: Tensor, part: Tensor) -> None:
    """total += part, rounded to total's type."""
    total.add_(part)


def accumulate_(total: Tensor, part: Tensor) -> None:
    """As the reference; on CUDA a kernel, because torch's sum of two types reads them number by number."""
    contiguous = total.is_contiguous() and part.is_contiguous()
    if kernels.enabled(total) and total.dtype == torch.float32 and contiguous:
        from trinity.ops.kernels import elementwise

        elementwise.accumulate_(total, part)
    else:
        total.add_(part)
