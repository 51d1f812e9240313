"""What all layers of one batch share: positions, masks, and which tokens make a document."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trinity.config.model import ModelConfig
from trinity.model.norm import Kernels
from trinity.model.rope import Rotation, rotation
from trinity.model.router import Documents
from trinity.ops.attention import AttentionPlan, dense_plan, fast_plan
from trinity.ops.key_ranges import KeyRanges, fast_range_plan

LONG_ROWS = 65536
"""Tokens of a row from which a GPU's masks are made of ranges of keys, a number a query, and not by trying each query
with each key: 17 billion pairs at 131 072 tokens."""


@dataclass(frozen=True)
class Layout:
    """Made once per batch by `make_layout`; context parallelism makes its own, with plans that gather keys, values."""

    turn: Rotation
    local_plan: AttentionPlan
    global_plan: AttentionPlan
    documents: Documents
    sum_parts: Callable[[Tensor], Tensor] | None = None
    """Where rows are split over ranks: the sum over the parts of what was measured on one, without gradient."""


class LayoutMaker(Protocol):
    """What makes the layout of a batch: `make_layout`, or context parallelism's, where each rank has a part of each
    row."""

    def __call__(
        self,
        config: ModelConfig,
        shape: tuple[int, int],
        device: torch.device,
        kernels: Kernels,
        segments_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> Layout: ...


def make_layout(
    config: ModelConfig,
    shape: tuple[int, int],
    device: torch.device,
    kernels: Kernels,
    segments_BT: Tensor | None = None,
    positions_BT: Tensor | None = None,
) -> Layout:
    """For rows of `shape` (B, T).

    `segments_BT` int: the document of each token inside its row, contiguous, -1 for padding; None means one document
    per row. Padding attends to padding, so that its outputs are finite, and is counted nowhere. `positions_BT` int:
    place in the document; by default counted from the segments.
    """
    starts_BT = document_starts(shape, segments_BT, device)
    if kernels == "fast" and device.type != "cpu" and shape[1] >= LONG_ROWS:
        local_ranges, global_ranges = (key_ranges(starts_BT, window) for window in (config.window, None))
        local_plan, global_plan = fast_range_plan(local_ranges, config.window), fast_range_plan(global_ranges, None)
    else:
        plan = fast_plan if kernels == "fast" else dense_plan
        local_plan = plan(*shape, config.window, segments_BT, device)
        global_plan = plan(*shape, None, segments_BT, device)
    if positions_BT is None:
        index_T = torch.arange(shape[1], device=device)
        positions_BT = index_T - torch.where(starts_BT, index_T, 0).cummax(dim=1).values
    turn = rotation(positions_BT, config.head_dim, config.rope_theta)
    return Layout(turn, local_plan, global_plan, make_documents(shape, device, segments_BT))


def key_ranges(starts_BT: Tensor, window: int | None) -> KeyRanges:
    """The first and the last key of each query of rows whose documents begin at `starts_BT`."""
    index_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    first_BT = torch.where(starts_BT, index_T, 0).cummax(dim=1).values
    if window is not None:
        first_BT = first_BT.maximum(index_T - (window - 1))
    return KeyRanges(first_BT, index_T, len(index_T))


def document_starts(shape: tuple[int, int], segments_BT: Tensor | None, device: torch.device) -> Tensor:
    """bool [B, T]: whether a document begins at the token."""
    starts_BT = torch.zeros(shape, dtype=torch.bool, device=device)
    starts_BT[:, 0] = True
    if segments_BT is not None:
        starts_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return starts_BT


def make_documents(shape: tuple[int, int], device: torch.device, segments_BT: Tensor | None) -> Documents:
    """Numbers the documents of a batch of `shape` (B, T); for `segments_BT` see `make_layout`."""
    starts_BT = document_starts(shape, segments_BT, device)
    document_N = starts_BT.flatten().cumsum(dim=0) - 1
    if segments_BT is None:
        return Documents(document_N, shape[0], None)
    real_N = segments_BT.flatten() >= 0
    if device.type == "cpu":
        return Documents(document_N, int(document_N[-1]) + 1, None if bool(real_N.all()) else real_N)
    # Reading the number of documents would wait for the device; there are at most as many as tokens.
    return Documents(document_N, document_N.numel(), real_N)
