"""Triton kernels: what the fast path runs on a GPU in place of chains of small operations.

Each file holds kernels, their launch and their gradient; the plain reference stands in the file of `trinity.ops` that
calls it. Under torch.compile the plain expressions are used instead, which the compiler fuses itself. Kernels compute
in float32 inside and round once. The tests also run them on a CPU, interpreted (TRITON_INTERPRET=1).
"""

import functools

import torch
from torch import Tensor


def enabled(x: Tensor) -> bool:
    """Whether operations on `x` run as Triton kernels."""
    return x.is_cuda and not torch.compiler.is_compiling()


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def programs(x: Tensor, tasks: int, per_processor: int = 4) -> int:
    """Programs that share `tasks` among them and each keep partial sums; few on a CPU, where they are interpreted."""
    most = per_processor * _processors(x.get_device()) if x.is_cuda else 3
    return max(1, min(tasks, most))


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`: what Triton wants as the size of a block."""
    return 1 << max(0, number - 1).bit_length()


def warps(elements: int) -> int:
    """Warps for a block of `elements` numbers: 8 to 16 a thread."""
    return max(1, min(16, elements // 256))
