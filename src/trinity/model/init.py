"""Starting weights, the same on every device and for every order of construction.

Each matrix has its own random stream, seeded by the run's seed and its name (an expert's by its number too), drawn on
the CPU in fp32. A rank that holds some matrices or some experts can draw those alone.
"""

import hashlib

import torch
from torch import Tensor


def initial_matrix(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """fp32 normal with deviation `std`, cut at three deviations.

    The published rule is a truncated normal with deviation 0.5 / sqrt(d); where it is cut is not public.
    """
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(key[:8], "little") >> 1)
    matrix = torch.empty(shape, dtype=torch.float32, device="cpu")
    return torch.nn.init.trunc_normal_(matrix, std=std, a=-3 * std, b=3 * std, generator=generator)


@torch.no_grad()
def fill(name: str, parameter: Tensor, std: float, seed: int, first_expert: int = 0) -> None:
    """Sets a matrix, or a stack of experts [E, ...] of which the first is expert `first_expert` of the layer."""
    if parameter.ndim == 2:
        parameter.copy_(initial_matrix(name, tuple(parameter.shape), std, seed))
        return
    for offset, expert in enumerate(parameter):
        expert.copy_(initial_matrix(f"{name}/{first_expert + offset}", tuple(expert.shape), std, seed))
