"""Muon on hidden matrices: momentum, orthogonalised per matrix, in batches of equal shape.

Source: Muon (Jordan et al. 2024) with the learning-rate factor sqrt(max(1, fan_out / fan_in)) and decoupled weight
decay. Experts are a batch of matrices and fused projections are several: each is orthogonalised on its own.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from trinity.ops.newton_schulz import COEFFICIENTS, orthogonalize, orthogonalize_reference
from trinity.optim.groups import MuonMatrix, lr_multiplier

STACK_ELEMENTS = 2**27
"""Matrices of equal shape are stacked for one batched iteration up to this many numbers (512 MiB in float32)."""


def muon_reference(
    weight: Tensor, grad: Tensor, momentum: Tensor, *, lr: float, beta: float, nesterov: bool, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """One Muon step of one matrix [M, N] with the exact U V^T: new (weight, momentum). Plain and slow, for tests."""
    momentum = beta * momentum + (1 - beta) * grad
    update = (1 - beta) * grad + beta * momentum if nesterov else momentum
    step = lr * lr_multiplier(*weight.shape) * orthogonalize_reference(update)
    return weight * (1 - lr * weight_decay) - step, momentum


class Muon:
    """State and step of Muon over a list of (possibly fused, possibly stacked) matrices."""

    def __init__(
        self, matrices: Sequence[MuonMatrix], *, beta: float, nesterov: bool, weight_decay: float, coefficients: str
    ) -> None:
        self.matrices = list(matrices)
        self.beta, self.nesterov, self.weight_decay = beta, nesterov, weight_decay
        self.coefficients = COEFFICIENTS[coefficients]
        self.momentum = {
            m.name: torch.zeros_like(m.parameter, memory_format=torch.contiguous_format) for m in self.matrices
        }

    @torch.no_grad()
    def step(self, lr: float, skip: Tensor | None = None) -> None:
        """Update every matrix that has a gradient. With `skip` non-zero (scalar on the device) nothing changes."""
        stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for matrix in self.matrices:
            grad = matrix.parameter.grad
            if grad is None:
                continue
            momentum = self.momentum[matrix.name]
            grad = grad.to(momentum.dtype)
            if skip is None:
                momentum.lerp_(grad, 1 - self.beta)
            else:
                grad = torch.where(skip != 0, momentum, grad)  # a bad gradient may hold NaN, which no factor removes
                momentum.lerp_(grad, 1 - self.beta)
            update = torch.lerp(grad, momentum, self.beta) if self.nesterov else momentum
            parts = zip(
                matrix.parameter.detach().split(matrix.parts, dim=-2), update.split(matrix.parts, dim=-2), strict=True
            )
            for weight, part in parts:
                stacks[weight.shape[-2], weight.shape[-1]].append((weight, part))
        keep = None if skip is None else (skip == 0).to(torch.float32)
        for entries in stacks.values():
            for chunk in _chunks(entries):
                self._apply(chunk, lr, keep)

    def _apply(self, entries: list[tuple[Tensor, Tensor]], lr: float, keep: Tensor | None) -> None:
        rows, columns = entries[0][0].shape[-2:]
        stack = torch.cat([part.reshape(-1, rows, columns) for _, part in entries])
        ortho = orthogonalize(stack, self.coefficients)
        rate, decay = lr * lr_multiplier(rows, columns), lr * self.weight_decay
        start = 0
        for weight, _ in entries:
            count = weight.numel() // (rows * columns)
            step = ortho[start : start + count].view(weight.shape).to(weight.dtype)
            start += count
            if keep is None:
                weight.mul_(1 - decay).add_(step, alpha=-rate)
            else:
                weight.mul_(1 - decay * keep).addcmul_(step, keep.to(weight.dtype), value=-rate)


def _chunks(entries: list[tuple[Tensor, Tensor]]) -> list[list[tuple[Tensor, Tensor]]]:
    """Consecutive entries of at most STACK_ELEMENTS numbers together; one larger entry stands alone."""
    chunks: list[list[tuple[Tensor, Tensor]]] = []
    size = 0
    for entry in entries:
        numel = entry[0].numel()
        if not chunks or size + numel > STACK_ELEMENTS:
            chunks.append([])
            size = 0
        chunks[-1].append(entry)
        size += numel
    return chunks
