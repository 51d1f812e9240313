"""The hybrid key/value cache: the last W tokens in local layers, all tokens in global ones, in blocks.

A request occupies a slot. Each kind of layer has one pool of blocks that all slots share, so that requests of unequal
lengths waste at most one block a layer, and memory grows with the tokens that are really there. In a global layer
token p lies in block p // S of its slot; in a local layer the blocks form a ring, and p takes the place of p - ring.
"""

import math

import torch

from trinity.config import ModelConfig
from trinity.config.model import LayerType


class BlockPool:
    """Keys and values of all layers of one kind, `block` tokens a block, and which block holds what of which slot."""

    def __init__(
        self,
        num_layers: int,
        config: ModelConfig,
        num_slots: int,
        block: int,
        ring: int | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.block = block
        self.ring_blocks = None if ring is None else math.ceil(ring / block)
        self._shape = (block, config.num_kv_heads, config.head_dim)
        self._blocks_of: list[list[int]] = [[] for _ in range(num_slots)]
        self._free: list[int] = []
        self._num_blocks = 0
        self.version = 0
        """Changes whenever a tensor of the pool is replaced by a larger one."""
        self.keys = [torch.empty(0, *self._shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self.values = [torch.empty(0, *self._shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self._table = torch.zeros(num_slots, 1, dtype=torch.int64, device=device)

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that slots hold."""
        if not self.keys:
            return 0
        block_bytes = math.prod(self._shape) * self.keys[0].element_size()
        return 2 * len(self.keys) * block_bytes * sum(map(len, self._blocks_of))

    def num_blocks(self, length: int) -> int:
        """Blocks of a slot that holds `length` tokens."""
        blocks = math.ceil(length / self.block)
        return blocks if self.ring_blocks is None else min(blocks, self.ring_blocks)

    def grow(self, slot: int, length: int) -> None:
        """Make room for `length` tokens in a slot."""
        held = self._blocks_of[slot]
        wanted = self.num_blocks(length)
        if wanted <= len(held):
            return
        new = [self._take() for _ in range(wanted - len(held))]
        if wanted > self._table.shape[1]:
            wider = torch.zeros(len(self._table), max(wanted, 2 * self._table.shape[1]), dtype=torch.int64)
            wider = wider.to(self._table.device)
            wider[:, : self._table.shape[1]] = self._table
            self._table = wider
            self.version += 1
        self._table[slot, len(held) : wanted] = torch.tensor(new, device=self._table.device)
        held += new

    def copy(self, source: int, target: int, length: int) -> None:
        """Give a slot what another one holds, `length` tokens."""
        self.grow(target, length)
        count = self.num_blocks(length)
        from_n, to_n = (
            torch.tensor(self._blocks_of[slot][:count], device=self._table.device) for slot in (source, target)
        )
        for stored in (*self.keys, *self.values):
            _bytes(stored)[to_n] = _bytes(stored)[from_n]

    def release(self, slot: int) -> None:
        self._free += reversed(self._blocks_of[slot])
        self._blocks_of[slot] = []

    @property
    def tables(self) -> torch.Tensor:
        """Block numbers int64 [slots, n] of all slots; entries that a slot does not hold are arbitrary."""
        return self._table

    def reserve(self, num_slots: int, length: int) -> None:
        """Allocate for `num_slots` slots of `length` tokens at once, so that nothing grows (and moves) later."""
        wanted = self.num_blocks(length)
        self._add(num_slots * wanted - self._num_blocks)
        if wanted > self._table.shape[1]:
            wider = self._table.new_zeros(len(self._table), wanted)
            wider[:, : self._table.shape[1]] = self._table
            self._table = wider
            self.version += 1

    def table(self, slots_B: torch.Tensor, max_length: int) -> torch.Tensor:
        """Block numbers [B, n] that cover `max_length` tokens; entries that a slot does not hold are arbitrary."""
        return self._table[slots_B, : max(1, self.num_blocks(max_length))]

    def places(self, slots_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """Where the token at a position of a slot lies, as an index into the flat tokens of the pool."""
        nth_N = positions_N // self.block
        if self.ring_blocks is not None:
            nth_N = nth_N % self.ring_blocks
        return self._table[slots_N, nth_N] * self.block + positions_N % self.block

    def positions(self, lengths_B: torch.Tensor, max_length: int) -> torch.Tensor:
        """Position [B, S] of the token at each place of `table`, -1 where there is none, for slots of given lengths."""
        num_places = max(1, self.num_blocks(max_length)) * self.block
        place_S = torch.arange(num_places, device=lengths_B.device)
        last_B1 = lengths_B[:, None] - 1
        if self.ring_blocks is None:
            return torch.where(place_S <= last_B1, place_S, -1)
        ring = self.ring_blocks * self.block
        position_BS = last_B1 - (last_B1 - place_S) % ring
        return position_BS.clamp(min=-1)

    def write(self, layer: int, places_N: torch.Tensor, k_NGK: torch.Tensor, v_NGK: torch.Tensor) -> None:
        for stored, new in ((self.keys[layer], k_NGK), (self.values[layer], v_NGK)):
            _bytes(stored).flatten(0, 1)[places_N] = _bytes(narrowed(new, stored.dtype))

    def gather(self, layer: int, table_Bn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, S, G, K] of the slots behind a table."""
        batch = len(table_Bn)
        shape = (batch, -1, *self._shape[1:])
        flat = table_Bn.flatten()
        k, v = (
            _bytes(stored).index_select(0, flat).view(stored.dtype).view(shape)
            for stored in (self.keys[layer], self.values[layer])
        )
        return k, v

    def _take(self) -> int:
        if not self._free:
            self._add(max(16, self._num_blocks // 2))
        return self._free.pop()

    def _add(self, more: int) -> None:
        """Room for that many blocks more; the pool's tensors move."""
        if more <= 0:
            return
        for stored in (self.keys, self.values):
            for layer, old in enumerate(stored):
                larger = torch.zeros(self._num_blocks + more, *self._shape, dtype=old.dtype, device=old.device)
                _bytes(larger)[: self._num_blocks] = _bytes(old)
                stored[layer] = larger
        self._free = list(range(self._num_blocks + more - 1, self._num_blocks - 1, -1)) + self._free
        self._num_blocks += more
        self.version += 1


FP8 = torch.float8_e4m3fn


def narrowed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in the cache's type; what FP8 cannot hold becomes its largest number, not NaN."""
    return x.clamp(-448, 448).to(dtype) if dtype == FP8 else x.to(dtype)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """FP8 as bytes, because indexing is not defined for it everywhere."""
    return x.view(torch.uint8) if x.dtype == FP8 else x


class Cache:
    """The pools of both kinds of layers. Slots are numbered 0 .. num_slots - 1."""

    def __init__(
        self, config: ModelConfig, num_slots: int, *, device: torch.device, dtype: torch.dtype, block: int = 64
    ) -> None:
        kinds: tuple[LayerType, ...] = ("local", "global")
        rings: dict[LayerType, int | None] = {"local": config.window, "global": None}
        self.pools: dict[LayerType, BlockPool] = {
            kind: BlockPool(config.layers.count(kind), config, num_slots, block, rings[kind], device, dtype)
            for kind in kinds
        }
        counts = dict.fromkeys(kinds, 0)
        self.places: list[tuple[LayerType, int]] = []
        """Pool and number in the pool of each layer of the model."""
        for kind in config.layers:
            self.places.append((kind, counts[kind]))
            counts[kind] += 1
        self.lengths = [0] * num_slots
        """Tokens that each slot holds."""

    @property
    def used_bytes(self) -> int:
        """Bytes of K and V in use: `ModelConfig.kv_cache_bytes` of each slot, lengths rounded up to whole blocks."""
        return sum(pool.used_bytes for pool in self.pools.values())

    @property
    def version(self) -> int:
        """Changes whenever a tensor of a pool is replaced."""
        return sum(pool.version for pool in self.pools.values())

    def reserve(self, num_slots: int, length: int) -> None:
        """Allocate for `num_slots` slots of `length` tokens at once, instead of growing with use."""
        for pool in self.pools.values():
            pool.reserve(num_slots, length)

    def grow(self, slot: int, length: int) -> None:
        """Make room for `length` tokens in a slot; `lengths` is set by whoever writes them."""
        for pool in self.pools.values():
            pool.grow(slot, length)

    def copy(self, source: int, target: int) -> None:
        """Give an empty slot the tokens of another one."""
        assert not self.lengths[target]
        for pool in self.pools.values():
            pool.copy(source, target, self.lengths[source])
        self.lengths[target] = self.lengths[source]

    def release(self, slot: int) -> None:
        """Give a slot's blocks back."""
        for pool in self.pools.values():
            pool.release(slot)
        self.lengths[slot] = 0
