"""Causal attention over a window and inside documents: one plan per kind of layer, made once per batch.

A plan knows which keys each query sees and how to compute that on its device. Query t of a row sees key j when j <= t,
j > t - window (the window counts the token itself) and both carry the same segment number. All plans give the same
numbers; `DensePlan` is the reference, the others skip what the mask hides:

- `DocumentPlan` (CPU, global layers): causal attention on each document alone, no mask at all.
- `BlockPlan` (CPU, local layers): a block of queries against the keys that its window can reach.
- `FlexPlan` (CUDA): compiled FlexAttention with block masks of window and document.

Suffixes as in `trinity.model`; S keys, U queries of a block, n blocks of a row.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from trinity.ops.autograd import once_differentiable
from trinity.ops.matmul import widens


class AttentionPlan(Protocol):
    """Attention for the masks of one batch."""

    def attend(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(K) + mask) v as [B, T, H, K]; query head h reads KV head h // (H / G)."""
        ...

    def describe(self) -> str:
        """The path in a few words, for the log of a run."""
        ...


def visible(
    query_T: Tensor, key_S: Tensor, window: int | None, query_segments_BT: Tensor | None, key_segments_BS: Tensor | None
) -> Tensor:
    """Whether a query sees a key: bool [B or 1, T, S]. `query_T` and `key_S` are positions in the row."""
    distance_TS = query_T[:, None] - key_S[None, :]
    seen_BTS = (distance_TS >= 0)[None]
    if window is not None:
        seen_BTS = seen_BTS & (distance_TS < window)
    if query_segments_BT is not None and key_segments_BS is not None:
        seen_BTS = seen_BTS & (query_segments_BT[:, :, None] == key_segments_BS[:, None, :])
    return seen_BTS


def reference_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, seen_BTS: Tensor) -> Tensor:
    """Attention as written in books: explicit mask, softmax in fp32. Every query must see at least one key."""
    ratio = q_BTHK.shape[2] // k_BSGK.shape[2]
    k_BSHK, v_BSHK = k_BSGK.repeat_interleave(ratio, dim=2), v_BSGK.repeat_interleave(ratio, dim=2)
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK).float() * q_BTHK.shape[-1] ** -0.5
    weights_BHTS = scores_BHTS.masked_fill(~seen_BTS[:, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bhts,bshk->bthk", weights_BHTS.to(v_BSHK.dtype), v_BSHK)


@dataclass(frozen=True)
class DensePlan:
    """The reference: every score is computed, then masked."""

    seen_BTS: Tensor

    def attend(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        return reference_attention(q_BTHK, k_BSGK, v_BSGK, self.seen_BTS)

    def describe(self) -> str:
        return "reference, explicit mask"


@dataclass(frozen=True)
class DocumentPlan:
    """Causal SDPA on each document: its cost is the sum of squared lengths, not rows * T^2."""

    lengths: tuple[int, ...]
    """Tokens of each document, rows one after the other; documents do not cross rows. Equal lengths share a call."""

    def attend(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        if len(set(self.lengths)) == 1:
            shape = (-1, self.lengths[0])
            o = sdpa(*(x.reshape(*shape, *x.shape[2:]) for x in (q_BTHK, k_BSGK, v_BSGK)), causal=True)
            return o.reshape(q_BTHK.shape)
        parts = (x.flatten(0, 1).split(self.lengths) for x in (q_BTHK, k_BSGK, v_BSGK))
        outputs = [sdpa(q[None], k[None], v[None], causal=True)[0] for q, k, v in zip(*parts, strict=True)]
        return torch.cat(outputs).view(q_BTHK.shape)

    def describe(self) -> str:
        return "SDPA, causal, one call per document"


@dataclass(frozen=True)
class BlockPlan:
    """Blocks of `block` queries against `reach` earlier blocks of keys and their own."""

    block: int
    reach: int
    seen_XUS: Tensor
    """[B*n, 1, U, S] bool, X = B*n: for each block of queries, its keys."""

    def attend(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        T = q_BTHK.shape[1]
        tail = -T % self.block
        if tail:
            q_BTHK, k_BSGK, v_BSGK = (F.pad(x, (0, 0, 0, 0, 0, tail)) for x in (q_BTHK, k_BSGK, v_BSGK))
        q_XUHK = q_BTHK.reshape(-1, self.block, *q_BTHK.shape[2:])
        k_XSGK, v_XSGK = (_KeyBlocks.apply(x, self.block, self.reach) for x in (k_BSGK, v_BSGK))
        o_BTHK = sdpa(q_XUHK, k_XSGK, v_XSGK, mask=self.seen_XUS).reshape(q_BTHK.shape)
        return o_BTHK[:, :T] if tail else o_BTHK

    def describe(self) -> str:
        return f"SDPA, blocks of {self.block} queries against {(self.reach + 1) * self.block} keys"


class _KeyBlocks(torch.autograd.Function):
    """[B, n * block, G, K] -> [B * n, (reach + 1) * block, G, K]: for each block, the blocks before it and its own.

    Zeros stand where the row has not begun. The gradient adds each copy to its source, in place.
    """

    @staticmethod
    def forward(ctx, x_BTGK: Tensor, block: int, reach: int) -> Tensor:
        x_BnCGK = x_BTGK.unflatten(1, (-1, block))
        B, n, _, G, K = x_BnCGK.shape
        copies = x_BTGK.new_zeros(B, n, reach + 1, block, G, K)
        for back in range(min(reach, n - 1) + 1):
            copies[:, back:, reach - back] = x_BnCGK[:, : n - back]
        ctx.copies_shape = copies.shape
        return copies.view(B * n, (reach + 1) * block, G, K)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs: Tensor):
        copies = d_outputs[0].reshape(ctx.copies_shape)
        n, reach = copies.shape[1], copies.shape[2] - 1
        d_x_BnCGK = copies[:, :, reach].clone(memory_format=torch.contiguous_format)
        for back in range(1, min(reach, n - 1) + 1):
            d_x_BnCGK[:, : n - back] += copies[:, back:, reach - back]
        return d_x_BnCGK.flatten(1, 2), None, None


@dataclass(frozen=True)
class MaskedPlan:
    """SDPA with an explicit mask: for many short documents, where one call each would cost more."""

    seen_BTS: Tensor

    def attend(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        return sdpa(q_BTHK, k_BSGK, v_BSGK, mask=self.seen_BTS[:, None])

    def describe(self) -> str:
        return "SDPA, explicit mask"


@dataclass(frozen=True)
class FlexPlan:
    """FlexAttention: tiles of 128 x 128 that no query needs are skipped, forward and backward."""

    block_mask: BlockMask

    def attend(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
        # A compiled block captures the operation as it is; alone it must be compiled, or it would build every score.
        flex = flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)
        o_BHTK = flex(q, k, v, block_mask=self.block_mask, enable_gqa=q.shape[1] != k.shape[1])
        assert isinstance(o_BHTK, Tensor)
        return o_BHTK.transpose(1, 2)

    def describe(self) -> str:
        return "FlexAttention, compiled, block mask"


def dense_plan(
    num_rows: int, seq_len: int, window: int | None, segments_BT: Tensor | None, device: torch.device
) -> DensePlan:
    """The reference plan for any device."""
    del num_rows  # the mask of rows without segments is shared by all of them
    index_T = torch.arange(seq_len, device=device)
    return DensePlan(visible(index_T, index_T, window, segments_BT, segments_BT))


def fast_plan(
    num_rows: int, seq_len: int, window: int | None, segments_BT: Tensor | None, device: torch.device
) -> AttentionPlan:
    """The fastest plan of the device for rows of `seq_len` tokens.

    `window=None` is a global layer. `segments_BT` int: the number of the document of each token, documents being
    contiguous; None means that each row is one document. Call it once per batch and kind of layer; on CUDA it does
    not wait for the device.
    """
    if window is not None and window >= seq_len:
        window = None
    if device.type != "cpu":
        return _flex_plan(num_rows, seq_len, window, segments_BT, device)
    if window is not None:
        return _block_plan(num_rows, seq_len, window, segments_BT)
    lengths = (seq_len,) * num_rows if segments_BT is None else document_lengths(segments_BT)
    if len(set(lengths)) == 1 or _loop_pays(lengths, num_rows, seq_len):
        return DocumentPlan(lengths)
    index_T = torch.arange(seq_len)
    return MaskedPlan(visible(index_T, index_T, None, segments_BT, segments_BT))


def document_lengths(segments_BT: Tensor) -> tuple[int, ...]:
    """Tokens of each run of equal segment numbers, rows one after the other. Reads the values: not for a GPU."""
    num_rows, seq_len = segments_BT.shape
    new_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    new_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts = new_BT.flatten().nonzero().flatten()
    return tuple(torch.diff(starts, append=torch.tensor([num_rows * seq_len])).tolist())


def _loop_pays(lengths: tuple[int, ...], num_rows: int, seq_len: int) -> bool:
    """A call costs about what 64 * 64 scores cost; a masked call computes every score, a causal one half of them."""
    return sum(64 * 64 + length * length // 2 for length in lengths) < num_rows * seq_len * seq_len


def _block_plan(num_rows: int, seq_len: int, window: int, segments_BT: Tensor | None) -> BlockPlan:
    # A quarter of a window: a query sees four fifths of the keys that are computed for it; keys are copied five times.
    block = min(512, max(16, -(-window // 4)))
    reach = -(-(window - 1) // block)
    num_blocks = -(-seq_len // block)
    query_U = torch.arange(block) + reach * block
    key_S = torch.arange((reach + 1) * block)
    # In a frame where the block's keys start at 0 the window looks the same for every block.
    seen_nUS = visible(query_U, key_S, window, None, None).expand(num_blocks, -1, -1)
    first_n = (torch.arange(num_blocks) - reach) * block
    exists_nS = first_n[:, None] + key_S >= 0
    seen_nUS = seen_nUS & exists_nS[:, None, :]
    if segments_BT is None:
        return BlockPlan(block, reach, seen_nUS.repeat(num_rows, 1, 1)[:, None])
    padded = F.pad(segments_BT, (reach * block, num_blocks * block - seq_len), value=-1)
    key_segments = padded.unfold(1, (reach + 1) * block, block)
    query_segments = key_segments[:, :, reach * block :]
    same = query_segments[..., :, None] == key_segments[..., None, :]
    return BlockPlan(block, reach, (seen_nUS & same).flatten(0, 1)[:, None])


def _flex_plan(
    num_rows: int, seq_len: int, window: int | None, segments_BT: Tensor | None, device: torch.device
) -> FlexPlan:
    if segments_BT is None:
        block_mask = _compiled(create_block_mask)(_causal(window), None, None, seq_len, seq_len, device=str(device))
    else:
        rule = _causal_in_document(window, segments_BT)
        block_mask = _compiled(create_block_mask)(rule, num_rows, None, seq_len, seq_len, device=str(device))
    return FlexPlan(block_mask)


def _causal(window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    if window is None:
        return causal
    size = window

    def local(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < size)

    return local


def _causal_in_document(window: int | None, segments_BT: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    inside = _causal(window)

    def causal_in_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return inside(b, h, query, key) & (segments_BT[b, query] == segments_BT[b, key])

    return causal_in_document


@functools.cache
def _compiled(function):
    return torch.compile(function)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """scaled_dot_product_attention on [*, T, heads, K], widened to float32 where that is faster (`ops/matmul.py`)."""
    dtype, wide = q.dtype, widens(q)
    q, k, v = ((x.float() if wide else x).transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return o.transpose(1, 2).to(dtype)
