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
from trinity.base.rng import derive
from trinity.ops import kernels
from trinity.ops.newton_schulz import COEFFICIENTS, orthogonalize, orthogonalize_reference
from trinity.ops.rounding import stochastic_round_
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


class _Part(NamedTuple):
    """Rows of one parameter that make one matrix, or one of each expert: views of the same shape."""

    weight: Tensor
    grad: Tensor
    momentum: Tensor


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
        stochastic: bool = False,
    ) -> None:
        self._noise = 0
        self.stochastic = stochastic
        """Round bfloat16 weights up or down by chance instead of to the nearest number."""
        self.matrices = list(matrices)
        self.beta, self.nesterov, self.weight_decay = beta, nesterov, weight_decay
        self.coefficients = COEFFICIENTS[coefficients]
        self.exchange = exchange
        self.momentum = {
            m.name: torch.zeros_like(local(m.parameter), memory_format=torch.contiguous_format) for m in self.matrices
        }

    @torch.no_grad()
    def step(self, lr: float, skip: Tensor | None = None, number: int = 0) -> None:
        """Update every matrix that has a gradient. With `skip` non-zero (scalar on the device) nothing changes.

        `number`: of the step; with the place of a weight it decides the noise of stochastic rounding.
        """
        self._noise = derive(number, "rounding")
        stacks: dict[tuple[int, int], list[_Part]] = defaultdict(list)
        split: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        for matrix in self.matrices:
            grad = matrix.parameter.grad
            if grad is None:
                continue
            weight, grad, momentum = local(matrix.parameter.detach()), local(grad), self.momentum[matrix.name]
            if self.exchange is not None and self.exchange.splits(matrix.name):
                weights[matrix.name], split[matrix.name] = weight, self._update(grad, momentum, skip)
            elif weight.numel():
                # Momentum moves where the part is stacked: a list of all updates would be a copy of all weights.
                for part in zip(*(t.split(matrix.parts, dim=-2) for t in (weight, grad, momentum)), strict=True):
                    stacks[part[0].shape[-2], part[0].shape[-1]].append(_Part(*part))
        if self.exchange is not None:
            self.exchange.begin(split)
        keep = None if skip is None else (skip == 0).to(torch.float32)
        for entries in stacks.values():
            for chunk in _chunks(entries):
                self._apply(chunk, lr, skip, keep)
        if self.exchange is not None:
            for rows in self.exchange.finish(lambda stack: orthogonalize(stack, self.coefficients)):
                self._apply_rows(weights, rows, lr, keep)

    def _update(self, grad: Tensor, momentum: Tensor, skip: Tensor | None) -> Tensor:
        """Moves the momentum; what is to be orthogonalised."""
        grad = grad.to(momentum.dtype)
        if skip is not None:
            grad = torch.where(skip != 0, momentum, grad)  # a bad gradient may hold NaN, which no factor removes
        momentum.lerp_(grad, 1 - self.beta)
        return torch.lerp(grad, momentum, self.beta) if self.nesterov else momentum

    def _apply(self, parts: list["_Part"], lr: float, skip: Tensor | None, keep: Tensor | None) -> None:
        rows, columns = parts[0].weight.shape[-2:]
        counts = [part.weight.numel() // (rows * columns) for part in parts]
        if all(kernels.enabled(t) and t.stride()[-2:] == (columns, 1) for part in parts for t in part):
            self._apply_in_two_passes(parts, counts, lr, skip)
            return
        updates = [self._update(part.grad, part.momentum, skip).reshape(-1, rows, columns) for part in parts]
        steps = orthogonalize(torch.cat(updates), self.coefficients).split(counts)
        self._move([part.weight for part in parts], list(steps), rows, columns, lr, keep)

    def _apply_in_two_passes(self, parts: list["_Part"], counts: list[int], lr: float, skip: Tensor | None) -> None:
        """The same on a GPU: gradient and momentum are read once, weights once."""
        from trinity.ops.kernels.muon import direction, move

        rows, columns = parts[0].weight.shape[-2:]
        stack = torch.empty(sum(counts), rows, columns, dtype=torch.bfloat16, device=parts[0].weight.device)
        for part, out in zip(parts, stack.split(counts), strict=True):
            direction(part.grad, part.momentum, skip, out, beta=self.beta, nesterov=self.nesterov)
        ortho = orthogonalize(stack, self.coefficients).contiguous()
        rate, decay = lr * lr_multiplier(rows, columns), lr * self.weight_decay
        for part, step in zip(parts, ortho.split(counts), strict=True):
            move(part.weight, step, skip, rate=rate, decay=decay, seed=self._seed(part.weight))

    def _seed(self, weight: Tensor) -> int | None:
        """Another one for each piece of weights that is moved in a step; None: round to the nearest number."""
        if not self.stochastic or weight.dtype != torch.bfloat16:
            return None
        self._noise += 1
        return self._noise % 2**31

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
            seed = self._seed(weight)
            if seed is not None:
                kept = 1.0 if keep is None else keep
                moved = weight.float() * (1 - decay * kept) - step.view(weight.shape).float() * (rate * kept)
                stochastic_round_(weight, moved, seed)
                continue
            step = step.view(weight.shape).to(weight.dtype)
            if keep is None:
                weight.mul_(1 - decay).add_(step, alpha=-rate)
            else:
                weight.mul_(1 - decay * keep).addcmul_(step, keep.to(weight.dtype), value=-rate)


def _chunks(entries: list[_Part]) -> list[list[_Part]]:
    """Consecutive entries of at most STACK_ELEMENTS numbers together; one larger entry stands alone."""
    chunks: list[list[_Part]] = []
    size = 0
    for entry in entries:
        numel = entry[0].numel()
        if not chunks or size + numel > STACK_ELEMENTS:
            chunks.append([])
            size = 0
        chunks[-1].append(entry)
        size += numel
    return chunks
