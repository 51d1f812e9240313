"""Ranks and collectives that do nothing in a single process.

Every function works without an initialised process group, so callers need no second path for one process.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from trinity.base.errors import UserError

T = TypeVar("T")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, as a view; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def initialized() -> bool:
    """Whether this process belongs to a group of processes."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if initialized() else 1


def is_main() -> bool:
    """Whether this process writes the run directory and speaks to the user."""
    return rank() == 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Maximum of `tensor` over all ranks in place, element by element; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank (small objects that this program made itself)."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """Rank 0's `value` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and give every rank its result; a UserError of rank 0 is raised on every rank."""
    if world_size() == 1:
        return work()
    result: tuple[T | None, str | None] = (None, None)
    if is_main():
        try:
            result = (work(), None)
        except UserError as error:
            result = (None, str(error))
    value, message = from_main(result)
    if message is not None:
        raise UserError(message)
    return value


def together(work: Callable[[], T]) -> T:
    """Do `work` on every rank, each with its own result; a UserError of one rank is raised on every rank."""
    if world_size() == 1:
        return work()
    result, message = None, None
    try:
        result = work()
    except UserError as error:
        message = str(error)
    for other in gather_objects(message):
        if other is not None:
            raise UserError(other)
    return cast("T", result)


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


class Place:
    """How far this process has come, for whoever watches over the group from another thread or machine."""

    def __init__(self) -> None:
        self.name = "the start"
        self.count = 0
        """Places so far: ranks that work together pass the same ones in the same order."""
        self.since = time.monotonic()

    def arrive(self, name: str) -> None:
        """The process has come to `name`, such as `step 12`; costs nothing."""
        self.name, self.since = name, time.monotonic()
        self.count += 1


place = Place()
"""Of this process. The training loop writes it, `parallel.watch` reads it."""
