"""Attention of some queries of a row over keys that are handed in: what context parallelism leaves to one rank.

Documents are contiguous and masks causal, so the keys that a query sees lie side by side: query t of row b sees the
keys `first_BT[b, t]` to `last_T[t]`, both inclusive, as indices into the handed keys. Windows, documents and the place
of the queries in the row are all in these two numbers; no plan below needs to know more. Suffixes as in
`ops/attention.py`.

`RangePlan` (CPU) and `FlexPlan` on `range_block_mask` (CUDA) skip what the ranges hide; `DensePlan` on `seen` is the
reference.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from trinity.ops.attention import AttentionPlan, DensePlan, FlexPlan, sdpa
from trinity.ops.autograd import once_differentiable


class KeyRanges(NamedTuple):
    """The keys of each query; int64, first 0 <= first <= last < num_keys. One row stands for all where B is 1."""

    first_BT: Tensor
    last_T: Tensor
    num_keys: int

    def seen(self) -> Tensor:
        """The mask that the ranges stand for: bool [B, T, S]."""
        key_S = torch.arange(self.num_keys, device=self.last_T.device)
        return (key_S >= self.first_BT[:, :, None]) & (key_S <= self.last_T[:, None])


def dense_range_plan(ranges: KeyRanges, window: int | None) -> AttentionPlan:
    """The reference plan, for any device."""
    del window  # it is in the ranges
    return DensePlan(ranges.seen())


def fast_range_plan(ranges: KeyRanges, window: int | None) -> AttentionPlan:
    """The fastest plan of the device. `window` only sets the size of blocks. On CUDA it does not wait for the
    device."""
    if ranges.last_T.device.type == "cpu":
        return _range_plan(ranges, window)
    return FlexPlan(range_block_mask(ranges))


class _Piece(NamedTuple):
    """Queries of one block, of all rows (row None) or of one, and the keys that any of them sees."""

    row: int | None
    keys: slice
    ranges: KeyRanges
    """Within `keys`. The mask is made of them when it is needed: those of all blocks would be a mask of the row."""


@dataclass(frozen=True)
class RangePlan:
    """SDPA for blocks of queries, each against the keys from its lowest first to its highest last."""

    lengths: tuple[int, ...]
    """Queries of each block."""
    blocks: tuple[tuple[_Piece, ...], ...]

    def attend(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        pieces = [piece for block in self.blocks for piece in block]
        parts = [(piece.row, piece.keys) for piece in pieces]
        keys, values = (iter(_Parts.apply(x, parts)) for x in (k_BSGK, v_BSGK))
        outputs = []
        for q_BUHK, block in zip(q_BTHK.split(self.lengths, dim=1), self.blocks, strict=True):
            queries = (q_BUHK,) if block[0].row is None else q_BUHK.split(1)
            rows = [
                sdpa(q, next(keys), next(values), mask=piece.ranges.seen()[:, None])
                for q, piece in zip(queries, block, strict=True)
            ]
            outputs.append(rows[0] if len(rows) == 1 else torch.cat(rows))
        return torch.cat(outputs, dim=1)

    def describe(self) -> str:
        return f"SDPA, blocks of {max(self.lengths)} queries against the keys that they see"


class _Parts(torch.autograd.Function):
    """Views x[row, keys] of x [B, S, G, K], overlapping; the gradient adds them up in one buffer, in place."""

    @staticmethod
    def forward(ctx, x_BSGK: Tensor, parts: Sequence[tuple[int | None, slice]]):
        ctx.shape, ctx.parts = x_BSGK.shape, parts
        return tuple(_part(x_BSGK, *part) for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        d_x_BSGK = d_outputs[0].new_zeros(ctx.shape)
        for part, d_part in zip(ctx.parts, d_outputs, strict=True):
            _part(d_x_BSGK, *part).add_(d_part)
        return d_x_BSGK, None


def _part(x_BSGK: Tensor, row: int | None, keys: slice) -> Tensor:
    return x_BSGK[:, keys] if row is None else x_BSGK[row : row + 1, keys]


def _range_plan(ranges: KeyRanges, window: int | None) -> RangePlan:
    first_BT, last_T, _ = ranges
    T = last_T.numel()
    size = 256 if window is None else min(512, max(16, -(-window // 4)))
    # The keys of a block should lie side by side: a block ends where a chunk of the row does.
    jumps = ((last_T[1:] != last_T[:-1] + 1).nonzero().flatten() + 1).tolist()
    borders = sorted({0, T, *jumps})
    starts = [at for low, high in itertools.pairwise(borders) for at in range(low, high, size)]
    lengths, blocks = [], []
    for start, stop in zip(starts, [*starts[1:], T], strict=True):
        first_BU, last_U = first_BT[:, start:stop], last_T[start:stop]
        same = bool((first_BU == first_BU[:1]).all())
        rows = [(None, first_BU[:1])] if same else [(b, row[None]) for b, row in enumerate(first_BU)]
        lengths.append(stop - start)
        blocks.append(tuple(_piece(row, first, last_U) for row, first in rows))
    return RangePlan(tuple(lengths), tuple(blocks))


def _piece(row: int | None, first_1U: Tensor, last_U: Tensor) -> _Piece:
    low, high = int(first_1U.min()), int(last_U.max()) + 1
    return _Piece(row, slice(low, high), KeyRanges(first_1U - low, last_U - low, high - low))


def range_block_mask(ranges: KeyRanges, block: int = 128) -> BlockMask:
    """FlexAttention's mask of the ranges, tiles of `block` x `block`.

    The ranges of a tile's queries decide at once which tiles of keys are needed, whole or in part: work of one number a
    tile, where `create_block_mask` evaluates the rule for each query and key. Nothing waits for the device.
    """
    first_BT, last_T, S = ranges
    T = last_T.numel()
    tail = -T % block
    query_nU = torch.arange(T + tail, device=last_T.device).clamp(max=T - 1).unflatten(0, (-1, block))
    first_BnU, last_nU = first_BT[:, query_nU], last_T[query_nU]
    key_start_m = torch.arange(0, S, block, device=last_T.device)
    key_stop_m = key_start_m + block  # beyond the end in the last tile, which is therefore never whole
    touched = (key_stop_m > first_BnU.amin(-1)[..., None]) & (key_start_m <= last_nU.amax(-1)[..., None])
    whole = (key_start_m >= first_BnU.amax(-1)[..., None]) & (key_stop_m <= last_nU.amin(-1)[..., None] + 1)
    if tail:  # tiles with fewer queries count as partial, as in create_block_mask
        whole[:, -1] = False
    first_BT, last_T = first_BT.int().contiguous(), last_T.int().contiguous()

    if first_BT.shape[0] == 1:
        first_T = first_BT[0]

        def in_range(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= first_T[query]) & (key <= last_T[query])
    else:

        def in_range(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= first_BT[b, query]) & (key <= last_T[query])

    partial_blocks, whole_blocks = (_ordered(tiles[:, None]) for tiles in (touched & ~whole, whole))
    return BlockMask.from_kv_blocks(
        *partial_blocks, *whole_blocks, BLOCK_SIZE=block, mask_mod=in_range, seq_lengths=(T, S)
    )


def _ordered(tiles_B1nm: Tensor) -> tuple[Tensor, Tensor]:
    """(number of chosen tiles [B, 1, n], all tiles of keys with the chosen ones first [B, 1, n, m]), int32."""
    order = tiles_B1nm.int().argsort(dim=-1, descending=True, stable=True)
    return tiles_B1nm.sum(-1, dtype=torch.int32), order.int()
