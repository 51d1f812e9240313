"""Stochastic rounding to bfloat16: up or down with the probabilities that make the expected value exact.

Weights that are kept in bfloat16 alone lose every update smaller than half a last place when it is rounded to the
nearest number; rounded so, small updates arrive on average. Adding 16 random bits below the last place and cutting them
off does it (Zamirai et al. 2020, arXiv 2010.06192).
"""

import torch
from torch import Tensor

from trinity.ops import kernels

_CUT = -(1 << 16)


def reference_stochastic_round(value: Tensor, noise: Tensor) -> Tensor:
    """bfloat16 of a float32 `value` with `noise` int32 in [0, 65536), elementwise; what is not finite stays so."""
    cut = ((value.view(torch.int32) + noise) & _CUT).view(torch.float32)
    return torch.where(value.isfinite(), cut, value).bfloat16()


@torch.no_grad()
def stochastic_round_(target: Tensor, value: Tensor, seed: int) -> None:
    """`target` (bfloat16) <- `value` (float32), of one shape; the noise follows from seed and kind of device."""
    assert target.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    if kernels.enabled(value):
        from trinity.ops.kernels.elementwise import stochastic_round_ as by_kernel

        place = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
        by_kernel(place, value.contiguous(), seed)
        if place is not target:
            target.copy_(place)
        return
    generator = torch.Generator(value.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    target.copy_(reference_stochastic_round(value.contiguous(), noise))
