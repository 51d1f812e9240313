"""Attention of new tokens over the cache: chunks of prompts, or one token of each request.

A step has N new tokens, those of a request one after the other. Everything but attention works on the flat N tokens;
here they are laid out as rows [B, C], one row a request, C the longest chunk. What depends on lengths alone (masks,
tables, places) is computed once a step and kind of layer; a layer then only writes, gathers and multiplies.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from trinity.config.model import LayerType
from trinity.infer.cache import BlockPool, Cache


class Chunk(NamedTuple):
    """New tokens of one slot; they follow the tokens that the slot already holds."""

    slot: int
    tokens: list[int]


class Kind(NamedTuple):
    """What one kind of layer needs in a step."""

    pool: BlockPool
    places_W: torch.Tensor
    """Where new tokens are written; in a local layer only the last of a long chunk are (without masks: the others have
    -1)."""
    written_W: torch.Tensor | None
    """Which of the new tokens are written; None: all."""
    table_Bn: torch.Tensor | None
    """Blocks that are read; None: nothing is cached yet."""
    old_BS: torch.Tensor | None
    """Positions of what is read, -1 where there is no key."""
    seen_BCS: torch.Tensor | None
    """Which keys each query sees: the cached ones, then, in a chunked step, the new ones; None without masks."""


class CachedPlan(NamedTuple):
    """One layer's attention in a step, with the interface of the plans of `trinity.ops.attention`."""

    step: "Step"
    kind: Kind
    layer: int

    def attend(self, q_1NHK: torch.Tensor, k_1NGK: torch.Tensor, v_1NGK: torch.Tensor) -> torch.Tensor:
        """Writes the new keys and values into the cache and returns what the queries read [1, N, H, K]."""
        q_NHK, k_NGK, v_NGK = q_1NHK[0], k_1NGK[0], v_1NGK[0]
        kind, step = self.kind, self.step
        if step.rows_BC is None:  # one token a request: into the cache first, then everything is read from there
            kind.pool.write(self.layer, kind.places_W, k_NGK, v_NGK)
            assert kind.table_Bn is not None
            k_BSGK, v_BSGK = kind.pool.gather(self.layer, kind.table_Bn)
            assert kind.seen_BCS is not None
            return _attend(q_NHK[:, None], k_BSGK, v_BSGK, kind.seen_BCS)[None, :, 0]
        # A chunk longer than the ring would overwrite keys that its first queries still see: read, then write.
        q_BCHK, k_BCGK, v_BCGK = q_NHK[step.rows_BC], k_NGK[step.rows_BC], v_NGK[step.rows_BC]
        if kind.table_Bn is not None:
            k_old, v_old = kind.pool.gather(self.layer, kind.table_Bn)
            k_BCGK, v_BCGK = (
                torch.cat((old.to(new.dtype), new), dim=1) for old, new in ((k_old, k_BCGK), (v_old, v_BCGK))
            )
        assert kind.seen_BCS is not None
        o_BCHK = _attend(q_BCHK, k_BCGK, v_BCGK, kind.seen_BCS)
        if kind.written_W is not None:
            k_NGK, v_NGK = k_NGK[kind.written_W], v_NGK[kind.written_W]
        kind.pool.write(self.layer, kind.places_W, k_NGK, v_NGK)
        assert step.flat_N is not None
        return o_BCHK.flatten(0, 1)[step.flat_N][None]

    def describe(self) -> str:
        return "SDPA over the blocks of the cache"


class Step:
    """Layout of one forward pass over `chunks`; makes room in the cache for them.

    Without `masks` it is a layout for kernels that find out by themselves what a query sees (`infer.kernels`).
    """

    def __init__(
        self, cache: Cache, chunks: Sequence[Chunk], window: int, device: torch.device, *, masks: bool = True
    ) -> None:
        self._cache = cache
        self._chunks = chunks
        counts = [len(chunk.tokens) for chunk in chunks]
        starts = [cache.lengths[chunk.slot] for chunk in chunks]
        for chunk, start, count in zip(chunks, starts, counts, strict=True):
            cache.grow(chunk.slot, start + count)
        counts_B, starts_host_B = torch.tensor(counts), torch.tensor(starts)
        first_B = counts_B.cumsum(0) - counts_B
        # One past the last new position of each token's request.
        ends_N = (starts_host_B + counts_B).repeat_interleave(counts_B).to(device)
        positions_N = torch.arange(sum(counts)) + (starts_host_B - first_B).repeat_interleave(counts_B)
        positions_N = positions_N.to(device)
        slots_N = torch.tensor([chunk.slot for chunk in chunks]).repeat_interleave(counts_B).to(device)
        tokens = chunks[0].tokens if len(chunks) == 1 else [token for chunk in chunks for token in chunk.tokens]
        self.tokens_1N = torch.tensor(tokens, device=device)[None]
        self.positions_1N = positions_N[None]
        longest = max(counts)
        self.rows_BC: torch.Tensor | None = None
        """Number among the N of each row's tokens, rows filled up with their last one; None: one token a row."""
        self.flat_N: torch.Tensor | None = None
        """Place in B * C of each of the N tokens."""
        self.last_B = (first_B + counts_B - 1).to(device)
        """Number among the N of each request's last token."""
        if longest > 1:
            columns_C = torch.arange(longest)
            rows_BC = first_B[:, None] + columns_C.minimum(counts_B[:, None] - 1)
            self.rows_BC = rows_BC.to(device)
            self.flat_N = (columns_C < counts_B[:, None]).flatten().nonzero()[:, 0].to(device)
        slots_B = torch.tensor([chunk.slot for chunk in chunks], device=device)
        self.starts_B = starts_B = starts_host_B.to(device)
        """Tokens that each request already holds."""
        self.kinds: dict[LayerType, Kind] = {}
        for name, pool in cache.pools.items():
            if not pool.keys:
                continue
            reach = window if name == "local" else None
            places_N = pool.places(slots_N, positions_N)
            if longest == 1:
                old_BS = pool.positions(starts_B + 1, max(starts) + 1)
                seen_BCS = _seen(starts_B[:, None], old_BS, reach) if masks else None
                self.kinds[name] = Kind(
                    pool, places_N, None, pool.table(slots_B, max(starts) + 1), old_BS, seen_BCS
                )  # fmt: skip
                continue
            old_BS = pool.positions(starts_B, max(starts)) if max(starts) else None
            table = pool.table(slots_B, max(starts)) if max(starts) else None
            seen_BCS = None
            if masks:
                query_BC = starts_B[:, None] + torch.arange(longest, device=device)
                key_BS = query_BC if old_BS is None else torch.cat((old_BS, query_BC), dim=1)
                seen_BCS = _seen(query_BC, key_BS, reach)
            written = None
            if pool.ring_blocks is not None and longest > pool.ring_blocks * pool.block:
                # Two tokens of a chunk must not go to one place: which of them would win is not defined.
                kept_N = positions_N >= ends_N - pool.ring_blocks * pool.block
                if masks:
                    written = kept_N.nonzero()[:, 0]
                    places_N = places_N[written]
                else:
                    places_N = places_N.where(kept_N, -1)
            self.kinds[name] = Kind(pool, places_N, written, table, old_BS, seen_BCS)

    def plans(self) -> list[CachedPlan]:
        """The attention of every layer of the model, in order."""
        return [CachedPlan(self, self.kinds[kind], layer) for kind, layer in self._cache.places]

    def commit(self) -> None:
        """Count the new tokens as held, once all layers have written them."""
        for chunk in self._chunks:
            self._cache.lengths[chunk.slot] += len(chunk.tokens)


def _seen(query_BC: torch.Tensor, key_BS: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether the query at a position sees the key at a position (-1: no key): bool [B, C, S]."""
    distance_BCS = query_BC[:, :, None] - key_BS[:, None, :]
    seen_BCS = (distance_BCS >= 0) & (key_BS >= 0)[:, None, :]
    return seen_BCS if window is None else seen_BCS & (distance_BCS < window)


def _attend(q_BCHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGK: torch.Tensor, seen_BCS: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q_BCHK, k_BSGK.to(q_BCHK.dtype), v_BSGK.to(q_BCHK.dtype)))
    grouped = q.shape[1] != k.shape[1]
    o_BHCK = scaled_dot_product_attention(q, k, v, attn_mask=seen_BCS[:, None], enable_gqa=grouped)
    return o_BHCK.transpose(1, 2)
