"""Whole matrices for Muon out of shards: one all-to-all each way for every shape of matrix.

A sharded matrix lies by rows on the ranks of a group. The matrices of equal shape are dealt out to the ranks; each
sends its rows of every matrix to the matrix's owner, which orthogonalises its matrices in one batch and sends every
rank its rows back. Who owns what, and who has which rows, follows from the shapes alone. While a batch is worked on,
the rows of the next one travel.

Matrices that are whole on their rank (experts dealt out by expert) do not come here. Replicas each do the same work:
sharing it among them would trade it for traffic between the hosts that are farthest apart.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from trinity.config import ModelConfig
from trinity.optim import muon
from trinity.optim.groups import matrix_parts
from trinity.optim.muon import Rows
from trinity.parallel.shard import Sharding
from trinity.parallel.slices import chunk


@dataclass(frozen=True)
class _Matrix:
    """One matrix of a split parameter."""

    name: str
    expert: int | None
    """Its place in this rank's stack; None where the parameter is no stack."""
    first: int
    """Its first row in the parameter, in which it may be one of several."""
    parameter_rows: int


class _Batch:
    """Matrices [M, N] of one shape over one group, dealt out to its ranks."""

    def __init__(self, matrices: Sequence[_Matrix], rows: int, columns: int, group: dist.ProcessGroup) -> None:
        self.rows, self.columns, self.group = rows, columns, group
        self.ranks, self.rank = group.size(), group.rank()
        self.owned: list[list[_Matrix]] = [list(matrices[rank :: self.ranks]) for rank in range(self.ranks)]
        mine = self.owned[self.rank]
        self.sends = [sum(len(self._held(m, self.rank)) for m in owned) * columns for owned in self.owned]
        self.takes = [sum(len(self._held(m, rank)) for m in mine) * columns for rank in range(self.ranks)]

    def _held(self, matrix: _Matrix, rank: int) -> range:
        """The rows of the matrix that `rank` has, counted in the parameter."""
        held = chunk(matrix.parameter_rows, self.ranks, rank)
        first, last = max(held.start, matrix.first), min(held.stop, matrix.first + self.rows)
        return range(first, max(first, last))

    def _index(self, matrix: _Matrix) -> tuple[int | slice, ...]:
        """Where this rank's rows of the matrix lie in its part of the parameter."""
        held, here = self._held(matrix, self.rank), chunk(matrix.parameter_rows, self.ranks, self.rank)
        rows = slice(held.start - here.start, held.stop - here.start)
        return (rows,) if matrix.expert is None else (matrix.expert, rows)

    def send(self, updates: Mapping[str, Tensor]) -> "_Travel":
        pieces = [updates[m.name][self._index(m)].reshape(-1) for owned in self.owned for m in owned]
        return _Travel(torch.cat(pieces), self.sends, self.takes, self.group)

    def stack(self, flat: Tensor) -> Tensor:
        """[owned, M, N] from what arrived, rank by rank."""
        mine = self.owned[self.rank]
        stack = flat.new_empty(len(mine), self.rows, self.columns)
        targets, pieces, start = [], [], 0
        for rank in range(self.ranks):
            for place, matrix in enumerate(mine):
                held = self._held(matrix, rank)
                if held:
                    targets.append(stack[place, held.start - matrix.first : held.stop - matrix.first])
                    pieces.append(flat[start : start + len(held) * self.columns].view(-1, self.columns))
                    start += len(held) * self.columns
        if targets:
            torch._foreach_copy_(targets, pieces)
        return stack

    def send_back(self, stack: Tensor) -> "_Travel":
        pieces = []
        for rank in range(self.ranks):
            for place, matrix in enumerate(self.owned[self.rank]):
                held = self._held(matrix, rank)
                pieces.append(stack[place, held.start - matrix.first : held.stop - matrix.first].reshape(-1))
        flat = torch.cat(pieces) if pieces else stack.new_empty(0)
        return _Travel(flat, self.takes, self.sends, self.group)

    def hand_out(self, flat: Tensor) -> list[Rows]:
        """This rank's rows of all matrices, from what came back, owner by owner."""
        found, start = [], 0
        for owned in self.owned:
            for matrix in owned:
                size = len(self._held(matrix, self.rank)) * self.columns
                if size:
                    step_RN = flat[start : start + size].view(-1, self.columns)
                    found.append(Rows(matrix.name, self._index(matrix), self.rows, step_RN))
                start += size
        return found


class _Travel:
    """An all-to-all under way."""

    def __init__(self, flat: Tensor, sends: list[int], takes: list[int], group: dist.ProcessGroup) -> None:
        self._flat = flat  # kept until it has arrived
        self._arriving = flat.new_empty(sum(takes))
        self._work = dist.all_to_all_single(self._arriving, flat, takes, sends, group=group, async_op=True)

    def wait(self) -> Tensor:
        assert self._work is not None
        self._work.wait()
        return self._arriving


class MuonExchange:
    """`optim.muon.Exchange` over the shards of a model."""

    def __init__(self, sharding: Sharding, config: ModelConfig) -> None:
        self._split: set[str] = set()
        self._updates: Mapping[str, Tensor] = {}
        self._first: _Travel | None = None
        found: dict[tuple[int, int, int], list[_Matrix]] = defaultdict(list)
        groups: dict[int, dist.ProcessGroup] = {}
        for name, parameter in sharding.parameters.items():
            if parameter.ndim < 2 or not isinstance(parameter, DTensor):
                continue
            mesh, placement = parameter.device_mesh, parameter.placements[-1]
            by_rows = placement.is_shard(parameter.ndim - 2)  # pyright: ignore[reportArgumentType]
            if mesh.size(mesh.ndim - 1) == 1 or not by_rows:
                continue
            self._split.add(name)
            group = mesh.get_group(mesh.ndim - 1)
            groups[id(group)] = group
            rows, columns = parameter.shape[-2:]
            experts = [None] if parameter.ndim == 2 else range(parameter.shape[0])
            parts = matrix_parts(name, parameter.shape, config)
            for first, part in zip(accumulate(parts, initial=0), parts, strict=False):
                found[id(group), part, columns] += [_Matrix(name, expert, first, rows) for expert in experts]
        self._found, self._groups = found, groups
        self._batches: list[_Batch] | None = None

    def splits(self, name: str) -> bool:
        return name in self._split

    def begin(self, updates: Mapping[str, Tensor]) -> None:
        if self._batches is None:
            self._batches = self._plan(updates.keys())
        self._updates = updates
        self._first = self._batches[0].send(updates) if self._batches else None

    def finish(self, orthogonalize: Callable[[Tensor], Tensor]) -> Iterator[list[Rows]]:
        batches, coming, returning = self._batches or [], self._first, None
        for number, batch in enumerate(batches):
            assert coming is not None, "finish before begin"
            stack = batch.stack(coming.wait())
            coming = batches[number + 1].send(self._updates) if number + 1 < len(batches) else None
            back = batch.send_back(orthogonalize(stack) if len(stack) else _nothing(stack, orthogonalize))
            if returning is not None:
                yield returning[0].hand_out(returning[1].wait())
            returning = batch, back
        if returning is not None:
            yield returning[0].hand_out(returning[1].wait())
        self._updates, self._first = {}, None

    def _plan(self, names: Collection[str]) -> list[_Batch]:
        """Batches of at most `STACK_ELEMENTS` numbers a rank, of the parameters that Muon moves."""
        batches = []
        for (group, rows, columns), matrices in self._found.items():
            moved = [matrix for matrix in matrices if matrix.name in names]
            most = self._groups[group].size() * max(1, muon.STACK_ELEMENTS // (rows * columns))
            for number in range(math.ceil(len(moved) / most)):
                part = moved[number * most : (number + 1) * most]
                batches.append(_Batch(part, rows, columns, self._groups[group]))
        return batches


def _nothing(stack: Tensor, orthogonalize: Callable[[Tensor], Tensor]) -> Tensor:
    """An empty stack of the type that orthogonalised matrices have: all ranks must send the same type."""
    return orthogonalize(stack.new_zeros(1, 1, 1)).flatten()[:0].view(0, *stack.shape[1:])
