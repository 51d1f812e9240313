"""Attention over ranges of keys: against the explicit mask, and its tiles against those that torch finds by trying."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from trinity.model.layout import document_starts, key_ranges
from trinity.ops.attention import visible
from trinity.ops.key_ranges import KeyRanges, dense_range_plan, fast_range_plan, range_block_mask
from trinity.parallel.context import _window_ranges
from trinity.parallel.split import RowSplit, halo

ORDERS = st.sampled_from(["zigzag", "contiguous"])


def segments_of(seed: int, num_rows: int, seq_len: int) -> torch.Tensor:
    draws = np.random.default_rng(seed)
    starts = draws.random((num_rows, seq_len)) < draws.choice([0.02, 0.1, 0.5])
    return torch.from_numpy(starts.cumsum(1))


def begins(segments_BR: torch.Tensor) -> torch.Tensor:
    same = segments_BR[:, :, None] == segments_BR[:, None, :]
    return same.int().argmax(dim=2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), ORDERS, st.integers(1, 90), st.integers(0, 10**6))
def test_ranges_of_a_part_see_what_the_row_sees(ranks: int, size: int, order, window: int, seed: int) -> None:
    """Window, documents and place in the row, all in two numbers a query."""
    split = RowSplit(ranks, 2 * ranks * size, order)
    segments = segments_of(seed, 2, split.seq_len)
    row = torch.arange(split.seq_len)
    begin = begins(segments)
    for rank in range(ranks):
        here = torch.from_numpy(split.positions(rank))
        needed = torch.from_numpy(split.needed(rank, window))
        local = _window_ranges(split, rank, window, here, begin[:, here])
        expected = visible(here, needed, window, segments[:, here], segments[:, needed])
        assert torch.equal(local.seen(), expected)
        everything = KeyRanges(begin[:, here], here, split.seq_len)
        assert torch.equal(everything.seen(), visible(here, row, None, segments[:, here], segments))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 200), st.integers(1, 90), st.integers(0, 10**6))
def test_ranges_of_whole_rows_see_what_the_rule_says(num_rows: int, seq_len: int, window: int, seed: int) -> None:
    segments, row = segments_of(seed, num_rows, seq_len), torch.arange(seq_len)
    starts = document_starts((num_rows, seq_len), segments, segments.device)
    for reach in (window, None):
        assert torch.equal(key_ranges(starts, reach).seen(), visible(row, row, reach, segments, segments))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), ORDERS, st.integers(1, 120))
def test_a_halo_brings_exactly_the_needed_keys(ranks: int, size: int, order, window: int) -> None:
    split = RowSplit(ranks, 2 * ranks * size, order)
    routes = [halo(split, rank, window) for rank in range(ranks)]
    held = np.concatenate([split.positions(rank) for rank in range(ranks)])
    assert np.array_equal(np.sort(held), np.arange(split.seq_len))
    for rank, route in enumerate(routes):
        mine = split.positions(rank)
        sent = [split.positions(other)[routes[other].send[rank]] for other in range(ranks)]
        assert [len(part) for part in sent] == list(route.receive_counts)
        keys = np.full(len(split.needed(rank, window)), -1)
        keys[route.own] = mine
        keys[route.received] = np.concatenate(sent)
        assert np.array_equal(keys, split.needed(rank, window))


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("documents", [False, True])
def test_blocks_give_what_the_mask_gives(order, window: int | None, documents: bool) -> None:
    """Output and gradients of the three inputs; blocks of 16 queries, so a rank has several of them."""
    split = RowSplit(2, 320, order)
    segments = segments_of(1, 2, 320) if documents else torch.zeros(1, 320, dtype=torch.int64)
    begin = begins(segments)
    for rank in range(2):
        here = torch.from_numpy(split.positions(rank))
        if window is None:
            ranges = KeyRanges(begin[:, here], here, 320)
        else:
            ranges = _window_ranges(split, rank, window, here, begin[:, here])
        draws = torch.Generator().manual_seed(rank)
        shapes = ((2, len(here), 4, 8), (2, ranges.num_keys, 2, 8), (2, ranges.num_keys, 2, 8))
        inputs = [torch.randn(shape, generator=draws) for shape in shapes]
        d_o = torch.randn(shapes[0], generator=draws)
        results = []
        for plan in (dense_range_plan(ranges, window), fast_range_plan(ranges, window)):
            q, k, v = (x.clone().requires_grad_() for x in inputs)
            o = plan.attend(q, k, v)
            o.backward(d_o)
            results.append((o.detach(), q.grad, k.grad, v.grad))
        for found, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), ORDERS, st.none() | st.integers(1, 90), st.integers(0, 10**6))
def test_tiles_are_those_that_torch_finds(ranks: int, size: int, order, window: int | None, seed: int) -> None:
    """Every tile with a visible key is there; one that is called whole hides nothing; the rule inside is the mask."""
    split, block = RowSplit(ranks, 2 * ranks * size, order), 16
    begin = begins(segments_of(seed, 2, split.seq_len))
    here = torch.from_numpy(split.positions(seed % ranks))
    if window is None:
        ranges = KeyRanges(begin[:, here], here, split.seq_len)
    else:
        ranges = _window_ranges(split, seed % ranks, window, here, begin[:, here])
    found = range_block_mask(ranges, block)
    shape = (2, 1, len(here), ranges.num_keys)
    assert found.mask_mod is not None
    assert torch.equal(create_mask(found.mask_mod, *shape, device="cpu")[:, 0], ranges.seen())
    expected = create_block_mask(found.mask_mod, *shape, device="cpu", BLOCK_SIZE=block)
    assert found.shape == expected.shape
    some, whole = _tiles(found)
    wanted_some, wanted_whole = _tiles(expected)
    assert not (wanted_whole & ~(whole | some)).any()
    assert not (wanted_some & ~some).any()
    assert not (whole & ~wanted_whole).any()
    assert not (whole & some).any()
    if order == "contiguous" and len(here) % block == 0:  # only where two chunks share a tile is there one too many
        assert torch.equal(some | whole, wanted_some | wanted_whole)
        assert torch.equal(found.to_dense(), expected.to_dense())


def _tiles(mask: BlockMask) -> list[torch.Tensor]:
    """Tiles that are needed in part and whole, bool [B, 1, n, m]."""
    found = []
    for number, order in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        assert number is not None
        assert order is not None
        chosen = torch.arange(order.shape[-1]) < number[..., None]
        found.append(torch.zeros_like(chosen).scatter(-1, order.long(), chosen))
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("default")  # torch's compiler warns about itself
@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("seq_len", [2048, 2000])
def test_flex_attention_of_a_part_equals_the_mask(order, window: int | None, documents: bool, seq_len: int) -> None:
    """Every rank of four, without an exchange: the keys come from whole rows."""
    device = torch.device("cuda")
    split = RowSplit(4, seq_len, order)
    segments = segments_of(1, 2, seq_len) if documents else torch.zeros(1, seq_len, dtype=torch.int64)
    begin = begins(segments)
    for rank in range(4):
        here = torch.from_numpy(split.positions(rank))
        if window is None:
            ranges = KeyRanges(begin[:, here], here, seq_len)
        else:
            ranges = _window_ranges(split, rank, window, here, begin[:, here])
        ranges = KeyRanges(ranges.first_BT.to(device), ranges.last_T.to(device), ranges.num_keys)
        draws = torch.Generator(device).manual_seed(rank)
        shapes = ((2, len(here), 4, 64), (2, ranges.num_keys, 2, 64), (2, ranges.num_keys, 2, 64))
        inputs = [torch.randn(shape, generator=draws, device=device, dtype=torch.bfloat16) for shape in shapes]
        d_o = torch.randn(shapes[0], generator=draws, device=device, dtype=torch.bfloat16)
        results = []
        for plan in (dense_range_plan(ranges, window), fast_range_plan(ranges, window)):
            q, k, v = (x.clone().requires_grad_() for x in inputs)
            o = plan.attend(q, k, v)
            o.backward(d_o)
            results.append((o.detach(), q.grad, k.grad, v.grad))
        for found, expected in zip(results[1], results[0], strict=True):
            error = (found.float() - expected.float()).norm() / expected.float().norm()
            assert error < 2e-2, f"rank {rank}: {error:.1e}"
