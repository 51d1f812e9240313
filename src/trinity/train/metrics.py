"""What a step reports: one packed tensor from the device, made into one record of metrics.jsonl."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trinity.base import dist
from trinity.model.balance import max_vio

DEAD_STEPS = 20
"""Steps without a token after which an expert counts as dead."""
LOAD_EVERY = 10
"""Steps between records that carry the load of every expert."""


class Packed:
    """Named tensors of a step in one float64 vector, reduced over ranks and brought to the host in one copy."""

    def __init__(
        self, summed: Mapping[str, Tensor], largest: Mapping[str, Tensor], local: Mapping[str, Tensor]
    ) -> None:
        """`summed` and `largest` are to be reduced over ranks, `local` is not. The order of names is kept."""
        self._shapes = {name: tuple(t.shape) for part in (summed, largest, local) for name, t in part.items()}
        assert len(self._shapes) == len(summed) + len(largest) + len(local), "two tensors of a step have the same name"
        self._host: Tensor | None = None
        self._ready: torch.cuda.Event | None = None
        sums, most = dist.all_reduce_sum(_flatten(summed)), dist.all_reduce_max(_flatten(largest))
        self._device = torch.cat([sums, most, _flatten(local)])

    def device_value(self, name: str) -> Tensor:
        """A reduced value while it is still on the device."""
        start = 0
        for known, shape in self._shapes.items():
            size = math.prod(shape)
            if known == name:
                return self._device[start : start + size].reshape(shape)
            start += size
        raise KeyError(name)

    def append(self, local: Mapping[str, Tensor]) -> None:
        """Add values that every rank knows alike."""
        self._shapes |= {name: tuple(t.shape) for name, t in local.items()}
        self._device = torch.cat([self._device, _flatten(local)])

    def send(self) -> None:
        """Start the copy to the host; does not wait."""
        if self._device.is_cuda:
            self._host = torch.empty(self._device.shape, dtype=self._device.dtype, pin_memory=True)
            self._host.copy_(self._device, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()
        else:
            self._host = self._device

    def read(self) -> dict[str, Any]:
        """The values as NumPy arrays, scalars as floats. Waits for the copy: the step's one host sync."""
        assert self._host is not None, "read before send"
        if self._ready is not None:
            self._ready.synchronize()
        flat, values, start = self._host.numpy(), {}, 0
        for name, shape in self._shapes.items():
            size = math.prod(shape)
            values[name] = flat[start : start + size].reshape(shape) if shape else float(flat[start])
            start += size
        return values


def _flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    return torch.cat([t.detach().double().reshape(-1) for t in tensors.values()])


def routing_fields(counts_LE: np.ndarray) -> dict[str, Any]:
    """Balance of a step from its global counts: MaxVio = max n / mean n - 1, and the entropy of the load (1: even)."""
    if counts_LE.size == 0:
        return {"max_vio": None, "max_vio_layers": [], "load_entropy": []}
    max_vio_L = max_vio(torch.from_numpy(counts_LE)).numpy()
    share_LE = counts_LE / np.maximum(counts_LE.sum(1, keepdims=True), 1e-30)
    entropy_L = -(share_LE * np.log(np.where(share_LE > 0, share_LE, 1.0))).sum(1) / max(
        math.log(counts_LE.shape[1]), 1e-30
    )
    return {
        "max_vio": float(max_vio_L.mean()),
        "max_vio_layers": max_vio_L.tolist(),
        "load_entropy": entropy_L.tolist(),
    }


def load_share(counts_LE: np.ndarray) -> list[list[float]]:
    """Tokens of each expert as a share of its layer's mean, to three digits."""
    return np.round(counts_LE / np.maximum(counts_LE.mean(1, keepdims=True), 1e-30), 3).tolist()


class ExpertWatch:
    """Steps since each expert last had a token [L, E]."""

    def __init__(self) -> None:
        self._idle_LE = np.zeros((0, 0), dtype=np.int64)

    def update(self, counts_LE: np.ndarray) -> list[tuple[int, list[int]]]:
        """Take in a step's global counts; (MoE layer, experts) that died in this step."""
        if self._idle_LE.shape != counts_LE.shape:
            self._idle_LE = np.zeros(counts_LE.shape, dtype=np.int64)
        self._idle_LE = np.where(counts_LE > 0, 0, self._idle_LE + 1)
        died_LE = self._idle_LE == DEAD_STEPS
        return [(layer, np.flatnonzero(died_LE[layer]).tolist()) for layer in np.flatnonzero(died_LE.any(1)).tolist()]

    def dead_L(self) -> list[int]:
        """Dead experts of each MoE layer."""
        return (self._idle_LE >= DEAD_STEPS).sum(1).tolist()

    def state_dict(self) -> list[list[int]]:
        return [row.tolist() for row in self._idle_LE]

    def load_state_dict(self, state: list[list[int]]) -> None:
        self._idle_LE = np.array(state, dtype=np.int64).reshape(len(state), -1 if state else 0)
