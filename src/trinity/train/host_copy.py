"""Copies of the training state in the host's memory, taken beside training.

On a GPU the copies go over a stream of their own into pinned memory, while the next step's forward and backward passes
already run: they only read what is copied. What changes the state waits on the device for the end of the copies
(`protect`), and whoever reads a copy waits on the host (`Copy.ready`). The memory is allocated and pinned once, so a
copy must have been written away before the next is taken.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from trinity.base.errors import UserError

Name = TypeVar("Name", bound=Hashable)

ALIGNMENT = 512
"""Bytes; a multiple of every element's size."""


@dataclass(frozen=True)
class Copy(Generic[Name]):
    """Tensors on the CPU. On a GPU they hold their values once `ready` has returned."""

    tensors: dict[Name, Tensor]
    event: torch.cuda.Event | None = None

    def ready(self) -> None:
        """Wait on the host until the tensors are there; any thread may call it."""
        if self.event is not None:
            self.event.synchronize()


class HostCopies:
    """Takes copies of tensors of one layout again and again, into the same memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._arena: Tensor | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._running: torch.cuda.Event | None = None
        self._pinned = False

    def take(self, tensors: Mapping[Name, Tensor]) -> Copy[Name]:
        """A copy of each tensor's present values. Overwrites the last copy; does not wait for the device.

        Raises UserError when the host has too little memory.
        """
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        views = self._views(tensors)
        if self._stream is None:
            for name, tensor in tensors.items():
                views[name].copy_(tensor)
            return Copy(views)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                views[name].copy_(tensor, non_blocking=True)
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)  # one made for the occasion dies before it is copied
            self._running = torch.cuda.Event(blocking=True)  # the writer sleeps rather than spins
            self._running.record(self._stream)
        return Copy(views, self._running)

    def protect(self) -> None:
        """Call before the originals change: what the device does from now on waits for copies under way."""
        if self._running is not None:
            torch.cuda.current_stream(self.device).wait_event(self._running)
            self._running = None

    def close(self) -> None:
        """Wait for copies under way and give the memory back."""
        if self._stream is not None:
            self._stream.synchronize()
        if self._arena is not None and self._pinned:
            _check(_runtime().cudaHostUnregister(self._arena.data_ptr()), "released", self._arena.numel())
        self._arena, self._pinned = None, False

    def _views(self, tensors: Mapping[Name, Tensor]) -> dict[Name, Tensor]:
        """A place in the arena for each tensor; the arena is made at the first call."""
        places, size = {}, 0
        for name, tensor in tensors.items():
            places[name] = size
            size += math.ceil(tensor.numel() * tensor.element_size() / ALIGNMENT) * ALIGNMENT
        if self._arena is None or self._arena.numel() < size:
            self.close()
            self._arena = self._allocate(size)
        arena = self._arena
        return {
            name: arena[start : start + tensors[name].numel() * tensors[name].element_size()]
            .view(tensors[name].dtype)
            .view(tensors[name].shape)
            for name, start in places.items()
        }

    def _allocate(self, size: int) -> Tensor:
        try:
            arena = torch.empty(size, dtype=torch.uint8)
        except RuntimeError as error:
            raise UserError(_no_memory(size, "allocated")) from error
        # Not torch's own pinned memory: that comes in powers of two, which may be twice what is needed.
        if self._stream is not None and size:
            _check(_runtime().cudaHostRegister(arena.data_ptr(), size, 0), "pinned", size)
            self._pinned = True
        return arena


def _runtime() -> Any:
    return torch.cuda.cudart()


def _check(status: Any, what: str, size: int) -> None:
    if int(status) != 0:  # an enumeration of the CUDA runtime
        raise UserError(_no_memory(size, what))


def _no_memory(size: int, what: str) -> str:
    return (
        f"the host memory that checkpoints are copied to ({size / 2**30:.1f} GiB) could not be {what}; "
        "set checkpoint.asynchronous=false, which writes without a lasting copy"
    )
