"""A ledger of one rank's step: bytes that live, bytes that travel, read off the operations as they are dispatched.

Works on real and on fake tensors. Memory is what tensors ask for; an allocator adds rounding and fragments to it.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS = "activations and temporaries"
"""Everything that no other entry claims: what the backward pass needs, and whatever is computed on the way."""
GATHERED = "gathered weights"
REDUCED = "gradients on their way"
GRADIENTS = "gradients"
WEIGHTS = ("weights", "expert weights")
"""Groups of ranks that share weights, as `Ledger.groups` calls them."""


@dataclass(frozen=True)
class Memory:
    """Bytes by kind at one moment."""

    by_kind: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


@dataclass
class Traffic:
    """Messages of one kind over one group. `sent` is what leaves a rank when each byte travels once: (n - 1) / n of the
    whole for a gather or a scatter over n ranks, twice that for an all-reduce, what goes to others for an
    all-to-all."""

    ranks: int
    messages: int = 0
    sent: int = 0


@dataclass
class _Entry:
    kind: str
    size: int


@dataclass
class Ledger:
    """Counts while `watching`; kinds of traffic are told apart by their operation and by the name of their group."""

    groups: dict[str, str] = field(default_factory=dict)
    """Group name -> what it is called in `traffic`."""
    phase: str = ""
    traffic: dict[tuple[str, str, str], Traffic] = field(default_factory=dict)
    """By phase, operation and group."""
    live: Counter[str] = field(default_factory=Counter)
    peak: Memory = field(default_factory=lambda: Memory({}))
    _entries: dict[int, _Entry] = field(default_factory=dict)
    _total: int = 0

    def claim(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """From now on these tensors are counted as `kind`."""
        for tensor in tensors:
            self._see(tensor)
            entry = self._entries[_key(tensor)]
            self.live[entry.kind] -= entry.size
            self.live[kind] += entry.size
            entry.kind = kind

    def now(self) -> Memory:
        return Memory({kind: size for kind, size in self.live.items() if size})

    def reset_peak(self) -> None:
        self.peak = self.now()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside a FakeTensorMode, not around it."""
        resize = torch.UntypedStorage.resize_
        ledger = self

        def resize_(self: torch.UntypedStorage, size: int) -> Any:
            result = resize(self, size)
            ledger._resized(self._cdata, size)
            return result

        torch.UntypedStorage.resize_ = resize_  # FSDP frees and takes memory by it, which is no operation
        try:
            with _Mode(self):
                yield
        finally:
            torch.UntypedStorage.resize_ = resize

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._entries:
            return
        size = storage.nbytes()
        self._entries[key] = _Entry(ACTIVATIONS, size)
        weakref.finalize(storage, self._gone, key).atexit = False
        self._add(ACTIVATIONS, size)

    def _add(self, kind: str, size: int) -> None:
        self.live[kind] += size
        self._total += size
        if size > 0 and self._total > self.peak.total:
            self.peak = self.now()

    def _gone(self, key: int) -> None:
        entry = self._entries.pop(key)
        self._add(entry.kind, -entry.size)

    def _resized(self, key: int, size: int) -> None:
        entry = self._entries.get(key)
        if entry is not None:
            self._add(entry.kind, size - entry.size)
            entry.size = size

    def _travels(self, kind: str, group: dist.ProcessGroup, sent: int) -> None:
        name = self.groups.get(group.group_name, "all ranks")
        entry = self.traffic.setdefault((self.phase, kind, name), Traffic(group.size()))
        entry.messages += 1
        entry.sent += sent


class _Mode(TorchDispatchMode):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):  # a DTensor's own storage is nominal
                self.ledger._see(leaf)
        if func.namespace == "c10d":
            self._communication(func._opname, args)
        elif func._opname == "all_gather_copy_in":  # by FSDP, as the next two
            self.ledger.claim(GATHERED, result)
        elif func._opname == "split_with_sizes_copy" and func.namespace == "fsdp":
            self.ledger.claim(GATHERED, kwargs["out"])
        elif func._opname == "chunk_cat" and func.namespace == "fsdp":
            self.ledger.claim(REDUCED, [kwargs["out"]])
        return result

    def _communication(self, name: str, args: Any) -> None:
        groups = [dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a)]
        if not groups:
            return
        group, tensors = groups[0], [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        share, ledger = (group.size() - 1) / group.size(), self.ledger
        if "allgather" in name:
            ledger._travels("all-gather", group, round(_bytes(tensors[0]) * share))
        elif "reduce_scatter" in name:
            ledger._travels("reduce-scatter", group, round(_bytes(tensors[1]) * share))
            if self.ledger.groups.get(group.group_name, "") in WEIGHTS:
                ledger.claim(GRADIENTS, tensors[:1])
        elif "allreduce" in name:
            ledger._travels("all-reduce", group, round(2 * sum(map(_bytes, tensors)) * share))
        elif "alltoall_base" in name:
            splits = next(a for a in reversed(args) if isinstance(a, list))
            row = _bytes(tensors[1]) // max(1, tensors[1].shape[0])
            leaving = _bytes(tensors[1]) - splits[group.rank()] * row if splits else _bytes(tensors[1]) * share
            ledger._travels("all-to-all", group, round(leaving))


def _is_group(value: Any) -> bool:
    return "ProcessGroup" in str(value._type())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
