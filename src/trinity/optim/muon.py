"""Muon on hidden matrices: momentum, orthogonalised per matrix, in batches of equal shape.

Source: Muon (Jordan et al. 2024) with the learning-rate factor sqrt(max(1, fan_out / fan_in)) and decoupled weight
decay. Experts are a batch of matrices and fused projections are several: each is orthogonalised on its own.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trinity.base.dist import local
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


class Rows(NamedTuple):
    """Some rows of one matrix of a sharded parameter, and what they are to move by."""

    name: str
    place: tuple[int | slice, ...]
    """Where they lie in this rank's part of the parameter."""
    rows: int
    """Of the whole matrix."""
    step_RN: Tensor
    """These rows of the orthogonalised matrix."""


class Exchange(Protocol):
    """Makes whole matrices out of those that are split over ranks, and splits them again."""

    def splits(self, name: str) -> bool:
        """Whether the matrices of a parameter lie on several ranks; each of the others is whole on its rank."""
        ...

    def begin(self, updates: Mapping[str, Tensor]) -> None:
        """Set off with this rank's parts of the split parameters' updates; does not wait."""
        ...

    def finish(self, orthogonalize: Callable[[Tensor], Tensor]) -> Iterator[list[Rows]]:
        """This rank's rows of all orthogonalised matrices, in lists of matrices of one shape."""
        ...


class Muon:
    """State and step of Muon over a list of (possibly fused, possibly stacked, possibly sharded) matrices.

    A sharded parameter's state is this rank's part. Its matrices must be whole on their rank, unless `exchange` brings
    them together.
    """

    def __init__(
        self,
        matrices: Sequence[MuonMatrix],
        *,
        beta: float,
        nesterov: bool,
        weight_decay: float,
        coefficients: str,
        exchange: Exchange | None = None,
    ) -> None:
        self.matrices = list(matrices)
        self.beta, self.nesterov, self.weight_decay = beta, nesterov, weight_decay
        self.coefficients = COEFFICIENTS[coefficients]
        self.exchange = exchange
        self.momentum = {
            m.name: torch.zeros_like(local(m.parameter), memory_format=torch.contiguous_format) for m in self.matrices
        }

    @torch.no_grad()
    def step(self, lr: float, skip: Tensor | None = None) -> None:
        """Update every matrix that has a gradient. With `skip` non-zero (scalar on the device) nothing changes."""
        stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        split: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        for matrix in self.matrices:
            grad = matrix.parameter.grad
            if grad is None:
                continue
            update = self._update(matrix.name, local(grad), skip)
            weight = local(matrix.parameter.detach())
            if self.exchange is not None and self.exchange.splits(matrix.name):
                weights[matrix.name], split[matrix.name] = weight, update
            elif weight.numel():
                parts = zip(weight.split(matrix.parts, dim=-2), update.split(matrix.parts, dim=-2), strict=True)
                for part, update_part in parts:
                    stacks[part.shape[-2], part.shape[-1]].append((part, update_part))
        if self.exchange is not None:
            self.exchange.begin(split)
        keep = None if skip is None else (skip == 0).to(torch.float32)
        for entries in stacks.values():
            for chunk in _chunks(entries):
                self._apply(chunk, lr, keep)
        if self.exchange is not None:
            for rows in self.exchange.finish(lambda stack: orthogonalize(stack, self.coefficients)):
                self._apply_rows(weights, rows, lr, keep)

    def _update(self, name: str, grad: Tensor, skip: Tensor | None) -> Tensor:
        momentum = self.momentum[name]
        grad = grad.to(momentum.dtype)
        if skip is not None:
            grad = torch.where(skip != 0, momentum, grad)  # a bad gradient may hold NaN, which no factor removes
        momentum.lerp_(grad, 1 - self.beta)
        return torch.lerp(grad, momentum, self.beta) if self.nesterov else momentum

    def _apply(self, entries: list[tuple[Tensor, Tensor]], lr: float, keep: Tensor | None) -> None:
        rows, columns = entries[0][0].shape[-2:]
        stack = torch.cat([part.reshape(-1, rows, columns) for _, part in entries])
        ortho = orthogonalize(stack, self.coefficients)
        steps = ortho.split([weight.numel() // (rows * columns) for weight, _ in entries])
        self._move([weight for weight, _ in entries], list(steps), rows, columns, lr, keep)

    def _apply_rows(self, weights: Mapping[str, Tensor], rows: list[Rows], lr: float, keep: Tensor | None) -> None:
        if rows:
            pieces = [weights[piece.name][piece.place] for piece in rows]
            steps = [piece.step_RN for piece in rows]
            self._move(pieces, steps, rows[0].rows, steps[0].shape[-1], lr, keep)

    def _move(
        self, weights: list[Tensor], steps: list[Tensor], rows: int, columns: int, lr: float, keep: Tensor | None
    ) -> None:
        """Decay weights and step, all with the rate of a [rows, columns] matrix."""
        rate, decay = lr * lr_multiplier(rows, columns), lr * self.weight_decay
        for weight, step in zip(weights, steps, strict=True):
            step = step.view(weight.shape).to(weight.dtype)
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
