"""Context parallelism: each rank of a group holds a part of every row (`parallel/split.py`).

Everything of a layer but attention works on single tokens, so only keys and values travel, in one message a layer:

- a local layer gets the keys and values that its windows reach into (the halo), from however many ranks hold them;
- a global layer gathers those of the whole row; the gradient comes back as a reduce-scatter.

`ContextLayout` takes the place of `model.layout.make_layout`: once a batch it gathers the segment numbers of the rows
(integers) and derives which keys each query here sees. Positions for RoPE come with the rows and count in the document,
so they need no exchange. Two more quantities span ranks: the sequence-wise loss is a mean over whole documents, so
counts of those that cross a border of chunks are summed over the group; and a micro-batch's own loss, for BatchHet.

Reference: the unsplit model, whose outputs and gradients are the same up to the order of sums (the tests).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trinity.config.model import ModelConfig
from trinity.config.parallel import ContextOrder
from trinity.model.layout import Layout, document_starts
from trinity.model.norm import Kernels
from trinity.model.rope import rotation
from trinity.model.router import Documents
from trinity.model.transformer import Transformer
from trinity.ops.attention import AttentionPlan
from trinity.ops.autograd import once_differentiable, uncompiled
from trinity.ops.key_ranges import KeyRanges, dense_range_plan, fast_range_plan
from trinity.parallel.split import Halo, RowSplit, halo

# torch 2.13 renamed both and warns of the old names, torch 2.11 knows only those.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Exchange = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(k, v) of the tokens here [B, T, G, K] -> (k, v) of all keys that a layer needs here [B, S, G, K]; differentiable."""


@dataclass(frozen=True)
class ContextPlan:
    """An exchange of keys and values, then attention over what arrived."""

    exchange: Exchange
    inner: AttentionPlan
    name: str

    def attend(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        return self.inner.attend(q_BTHK, *self.exchange(k_BSGK, v_BSGK))

    def describe(self) -> str:
        return f"{self.name}, then {self.inner.describe()}"


class ContextLayout:
    """Makes the layouts of a rank's parts of rows: a `model.layout.LayoutMaker`.

    Called by all ranks of the group together, with parts of the same rows. Padding must stand at the end of a row.
    """

    def __init__(self, group: dist.ProcessGroup, order: ContextOrder = "zigzag") -> None:
        self.group = group
        self.order: ContextOrder = order
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def split(self, local_len: int) -> RowSplit:
        return RowSplit(self.size, local_len * self.size, self.order)

    def __call__(
        self,
        config: ModelConfig,
        shape: tuple[int, int],
        device: torch.device,
        kernels: Kernels,
        segments_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> Layout:
        """`shape` (B, T) and the tensors are of the part of the rows that this rank holds."""
        num_rows, split = shape[0], self.split(shape[1])
        row = (num_rows, split.seq_len)
        segments_BR = None if segments_BT is None else self.gather(segments_BT, split)
        index_R = torch.arange(split.seq_len, device=device)
        starts_BR = document_starts(row, segments_BR, device)
        if segments_BR is None:
            starts_BR = starts_BR[:1]
        begin_BR = torch.where(starts_BR, index_R, 0).cummax(dim=1).values
        """Where in the row the document of each token begins."""
        here_T = _indices(split, self.rank, device)
        begin_BT = begin_BR[:, here_T]
        if positions_BT is None:
            positions_BT = (here_T - begin_BT).expand(shape)
        reach = _window_ranges(split, self.rank, config.window, here_T, begin_BT)
        local = ContextPlan(
            self._window_exchange(split, config.window, device),
            self.plan(reach, config.window, kernels),
            f"halo of {config.window - 1} keys over {self.size} ranks",
        )
        everything = KeyRanges(begin_BT, here_T, split.seq_len)
        gather = functools.partial(_gather_keys, group=self.group, split=split)
        whole = ContextPlan(gather, self.plan(everything, None, kernels), f"keys gathered over {self.size} ranks")
        documents = self._documents(split, begin_BR, here_T, segments_BT, shape)
        turn = rotation(positions_BT, config.head_dim, config.rope_theta)
        return Layout(turn, local, whole, documents, self.sum)

    def plan(self, ranges: KeyRanges, window: int | None, kernels: Kernels) -> AttentionPlan:
        """Attention over the keys that an exchange brought."""
        return (fast_range_plan if kernels == "fast" else dense_range_plan)(ranges, window)

    def num_documents(self, running_N: Tensor, most: int) -> int:
        """An upper bound of the documents' numbers, the last of which is running_N[-1] and below `most`."""
        # Reading it would wait for the device; there are at most as many as tokens.
        return int(running_N[-1]) + 1 if running_N.device.type == "cpu" else most

    def gather(self, x_BT: Tensor, split: RowSplit) -> Tensor:
        """Whole rows [B, R * T] from the parts [B, T] of all ranks; without gradient."""
        return _in_row_order(_all_gather(x_BT, self.group), split)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks of the group, without gradient: of what is known of parts of rows only."""
        return _all_reduce(values.detach().clone(), self.group)

    def _window_exchange(self, split: RowSplit, window: int, device: torch.device) -> Exchange:
        route = _route(split, self.rank, window, device)
        return functools.partial(_exchange_windows, group=self.group, route=route)

    def _documents(
        self,
        split: RowSplit,
        begin_BR: Tensor,
        here_T: Tensor,
        segments_BT: Tensor | None,
        shape: tuple[int, int],
    ) -> Documents:
        """A document that crosses a border of chunks has the number of the first border it crosses, so every rank
        knows it by the same number; those inside a chunk are counted on from there."""
        B, T = shape
        device, borders = here_T.device, split.num_chunks - 1
        begin_BR = begin_BR.expand(B, -1)
        begin_BT = begin_BR[:, here_T]
        border_BT = begin_BT // split.chunk  # number c stands for the border after chunk c
        at_border_Bc = begin_BR[:, split.chunk :: split.chunk]
        across_BT = at_border_Bc.gather(1, border_BT.clamp(max=borders - 1)) <= begin_BT
        across_BT &= border_BT < borders
        row_B1 = torch.arange(B, device=device)[:, None] * borders
        new_BT = torch.ones(shape, dtype=torch.bool, device=device)
        new_BT[:, 1:] = begin_BT[:, 1:] != begin_BT[:, :-1]
        running_N = new_BT.flatten().cumsum(dim=0) - 1 + B * borders
        document_N = torch.where(across_BT.flatten(), (row_B1 + border_BT).flatten(), running_N)
        real_N = None if segments_BT is None else segments_BT.flatten() >= 0
        most = self.num_documents(running_N, B * borders + B * T)
        return Documents(document_N, most, real_N, functools.partial(_complete, group=self.group, shared=B * borders))


def split_rows(model: Transformer, group: dist.ProcessGroup, order: ContextOrder = "zigzag") -> ContextLayout:
    """From now on `model` works on parts of rows, split over `group`; returns what makes its layouts."""
    layout = ContextLayout(group, order)
    model.layout_maker = layout
    return layout


@functools.lru_cache(maxsize=64)
def _indices(split: RowSplit, rank: int, device: torch.device) -> Tensor:
    return torch.from_numpy(split.positions(rank)).to(device)


def _window_ranges(split: RowSplit, rank: int, window: int, here_T: Tensor, begin_BT: Tensor) -> KeyRanges:
    """Ranges of a local layer: positions in the row become places among the keys that the rank has."""
    needed = split.needed(rank, window)
    # Keys of one chunk and its window lie side by side, so a distance in the row is a distance among them.
    last_T = torch.from_numpy(np.searchsorted(needed, split.positions(rank))).to(here_T.device)
    reach_BT = (here_T - begin_BT).clamp(max=window - 1)
    return KeyRanges(last_T - reach_BT, last_T, len(needed))


@dataclass(frozen=True)
class _Route:
    """`Halo` on a device."""

    send: tuple[Tensor, ...]
    send_all: Tensor
    receive_counts: list[int]
    own: Tensor
    received: Tensor

    @property
    def send_counts(self) -> list[int]:
        return [len(part) for part in self.send]


@functools.lru_cache(maxsize=64)
def _route(split: RowSplit, rank: int, window: int, device: torch.device) -> _Route:
    found: Halo = halo(split, rank, window)
    send = tuple(torch.from_numpy(part).to(device) for part in found.send)
    own, received = (torch.from_numpy(x).to(device) for x in (found.own, found.received))
    return _Route(send, torch.cat(send), list(found.receive_counts), own, received)


# Exchanges stay outside of compiled blocks: a collective inside would be traced, and ranks trace different code.


@uncompiled
def _exchange_windows(
    k_BTGK: Tensor, v_BTGK: Tensor, *, group: dist.ProcessGroup, route: _Route
) -> tuple[Tensor, Tensor]:
    return _Windows.apply(k_BTGK, v_BTGK, group, route)


class _Windows(torch.autograd.Function):
    """Own keys and values, and those that the windows reach into, in the order of the row."""

    @staticmethod
    def forward(ctx, k_BTGK: Tensor, v_BTGK: Tensor, group: dist.ProcessGroup, route: _Route):
        ctx.group, ctx.route = group, route
        kv_TB2GK = torch.stack([k_BTGK, v_BTGK], dim=2).transpose(0, 1)
        arrived = kv_TB2GK.new_empty(len(route.received), *kv_TB2GK.shape[1:])
        outgoing = kv_TB2GK[route.send_all]
        dist.all_to_all_single(arrived, outgoing, route.receive_counts, route.send_counts, group=group)
        kv_SB2GK = kv_TB2GK.new_empty(len(route.own) + len(arrived), *kv_TB2GK.shape[1:])
        kv_SB2GK[route.own] = kv_TB2GK
        kv_SB2GK[route.received] = arrived
        k_SBGK, v_SBGK = kv_SB2GK.unbind(2)
        return k_SBGK.transpose(0, 1), v_SBGK.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        route: _Route = ctx.route
        d_kv_SB2GK = torch.stack(d_outputs, dim=2).transpose(0, 1)
        outgoing = d_kv_SB2GK[route.received]
        returned = outgoing.new_empty(len(route.send_all), *outgoing.shape[1:])
        dist.all_to_all_single(returned, outgoing, route.send_counts, route.receive_counts, group=ctx.group)
        d_kv_TB2GK = d_kv_SB2GK[route.own]
        # One rank after the other: each token once, so that the sum has one order.
        for places, part in zip(route.send, returned.split(route.send_counts), strict=True):
            d_kv_TB2GK.index_add_(0, places, part)
        d_k_TBGK, d_v_TBGK = d_kv_TB2GK.unbind(2)
        return d_k_TBGK.transpose(0, 1), d_v_TBGK.transpose(0, 1), None, None


@uncompiled
def _gather_keys(k_BTGK: Tensor, v_BTGK: Tensor, *, group: dist.ProcessGroup, split: RowSplit) -> tuple[Tensor, Tensor]:
    return _Rows.apply(k_BTGK, v_BTGK, group, split)


class _Rows(torch.autograd.Function):
    """Keys and values of whole rows; their gradients are summed over the ranks, each of which gets its part."""

    @staticmethod
    def forward(ctx, k_BTGK: Tensor, v_BTGK: Tensor, group: dist.ProcessGroup, split: RowSplit):
        ctx.group, ctx.split = group, split
        kv_2BTGK = torch.stack([k_BTGK, v_BTGK])
        k_BSGK, v_BSGK = _in_row_order(_all_gather(kv_2BTGK, group), split, dim=2).unbind(0)
        return k_BSGK, v_BSGK

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        d_kv_2BSGK = torch.stack(d_outputs)
        parts = _in_rank_order(d_kv_2BSGK, ctx.split, dim=2)
        d_kv_2BTGK = parts.new_empty(parts.shape[1:])
        _REDUCE_SCATTER(d_kv_2BTGK, parts.flatten(0, 1), group=ctx.group)
        return *d_kv_2BTGK.unbind(0), None, None


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, *shape of x]"""
    size = dist.get_world_size(group)
    parts = x.new_empty(size * x.shape[0], *x.shape[1:])
    _ALL_GATHER(parts, x.contiguous(), group=group)
    return parts.unflatten(0, (size, -1))


def _in_row_order(parts: Tensor, split: RowSplit, dim: int = 1) -> Tensor:
    """[ranks, ..., T, ...] -> [..., ranks * T, ...]; `dim` is that of T once ranks are gone."""
    pieces: list[Tensor] = [parts] * split.num_chunks  # placeholders
    for rank, part in enumerate(parts.unbind(0)):
        chunks = split.chunks(rank)
        for chunk, piece in zip(chunks, part.chunk(len(chunks), dim=dim), strict=True):
            pieces[chunk] = piece
    return torch.cat(pieces, dim=dim)


def _in_rank_order(row: Tensor, split: RowSplit, dim: int = 1) -> Tensor:
    """The inverse of `_in_row_order`."""
    pieces = row.chunk(split.num_chunks, dim=dim)
    ranks = [torch.cat([pieces[chunk] for chunk in split.chunks(rank)], dim=dim) for rank in range(split.num_ranks)]
    return torch.stack(ranks)


@uncompiled
def _complete(times_ME: Tensor, *, group: dist.ProcessGroup, shared: int) -> Tensor:
    """Counts of experts by document with those of the first `shared` documents summed over the group."""
    complete_ME = times_ME.clone()
    complete_ME[:shared] = _all_reduce(times_ME[:shared].clone(), group)
    return complete_ME


def _all_reduce(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(values, group=group)
    return values


def prepare(split: RowSplit, rank: int, window: int, device: torch.device) -> None:
    """Bring what depends on shapes alone to the device ahead of the first batch."""
    _indices(split, rank, device)
    _route(split, rank, window, device)
