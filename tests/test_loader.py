import json
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_store import FakeStore
from trinity.base.errors import UserError
from trinity.config import DataConfig, Phase
from trinity.data.loader import Loader, merge_states
from trinity.data.rows import IGNORE, Rows, to_device
from trinity.data.validation import ValidationRows

PHASES = (
    Phase(name="first", tokens=1000, weights={"a": 0.7, "b": 0.3}),
    Phase(name="second", tokens=1000, weights={"b": 0.5, "c": 0.5}),
)
SEQ_LEN = 24


def store_of(seed: int = 0, scale: int = 1) -> FakeStore:
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(1, 20, 120 * scale), *rng.integers(10, 90, 60 * scale), *rng.integers(200, 900, 6 * scale)]
    ids = [0] * 120 * scale + [1] * 60 * scale + [2] * 6 * scale
    return FakeStore([int(n) for n in lengths], ids, ["a", "b", "c"])


def loader_of(rank: int = 0, num_ranks: int = 1, **options: Any) -> Loader:
    data = DataConfig.model_validate({"buffer": 20, "streams": 8, "max_epochs": 50, "prefetch": 0} | options)
    return Loader(store_of(), data, PHASES, SEQ_LEN, 11, rank, num_ranks)


def plan(step: int) -> tuple[int, int]:
    """Rows and phase of a step: a ramp of the batch and a change of phase."""
    return (8 if step < 3 else 16), int(step >= 5)


def global_batch(loaders: list[Loader], step: int, num_rows: int | None = None) -> list:
    """Rows of all ranks, interleaved as they lie in the global batch."""
    rows, phase = plan(step)
    parts = [loader.next_rows(step, num_rows or rows, phase) for loader in loaders]
    return [
        (part.documents[row], part.tokens_BT[row].tolist(), part.targets_BT[row].tolist())
        for row in range(len(parts[0]))
        for part in parts
    ]


def group(num_ranks: int, **options) -> list[Loader]:
    return [loader_of(rank, num_ranks, **options) for rank in range(num_ranks)]


@pytest.mark.parametrize("packing", ["rsdb", "best-fit", "concat", "single"])
def test_global_batches_do_not_depend_on_the_number_of_ranks(packing: str) -> None:
    batches = {
        n: [global_batch(loaders, step) for step in range(8)]
        for n in (1, 2, 4, 8)
        if (loaders := group(n, packing=packing))
    }
    assert batches[1] == batches[2] == batches[4] == batches[8]


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(1, 3)), min_size=1, max_size=4),
    st.sampled_from([0, 2]),
    st.sampled_from(["rsdb", "best-fit", "concat", "single"]),
    st.sampled_from([1, 2, 3, 8]),
)
def test_kills_and_changes_of_ranks_do_not_change_the_batches(
    runs: list[tuple[int, int]], prefetch: int, packing: str, workers: int
) -> None:
    whole = group(1, packing=packing)
    state, step = None, 0
    for num_ranks, steps in runs:
        loaders = group(num_ranks, prefetch=prefetch, packing=packing, workers=workers)
        if state:
            for loader in loaders:
                loader.load_state_dict(state)
        for _ in range(steps):
            assert global_batch(loaders, step) == global_batch(whole, step)
            step += 1
        state = json.loads(json.dumps(merge_states([loader.state_dict() for loader in loaders[::-1]])))
        assert state == whole[0].state_dict()
        for loader in loaders:
            loader.close()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 120), min_size=1, max_size=60),
    st.integers(1, 90),
    st.integers(1, 40),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (8, 4), (8, 8), (6, 3)]),
    st.integers(1, 3),
    st.sampled_from(["rsdb", "concat", "best-fit", "single"]),
    st.integers(0, 2**32),
)
def test_every_token_of_every_document_comes_once_in_every_pass(
    lengths: list[int], seq_len: int, buffer: int, shape: tuple[int, int], epochs: int, packing: str, seed: int
) -> None:
    """Over the rows of all streams of all ranks until each is at its end."""
    streams, num_ranks = shape
    store = FakeStore(lengths, [0] * len(lengths), ["a"])
    data = DataConfig.model_validate(
        {"buffer": buffer, "streams": streams, "max_epochs": epochs, "prefetch": 0, "packing": packing}
    )
    phases = [Phase(name="p", tokens=1, weights={"a": 1.0})]
    seen: Counter[int] = Counter()
    for rank in range(num_ranks):
        loader = Loader(store, data, phases, seq_len, seed, rank, num_ranks)
        for packer in loader._packers.values():
            tokens_T, targets_T = np.zeros(seq_len, np.int64), np.zeros(seq_len, np.int64)
            while chunks := packer.fill(tokens_T, targets_T):
                seen.update(tokens_T[: sum(chunk.length for chunk in chunks)].tolist())
    assert seen == {d * 10_000 + t: epochs for d, length in enumerate(lengths) for t in range(1, length + 1)}


@pytest.mark.parametrize("workers", [2, 3, 8, 20])
def test_any_number_of_workers_gives_the_same_batches(workers: int) -> None:
    one = loader_of()
    with loader_of(workers=workers) as several:
        for step in range(8):
            ours, theirs = several.next_rows(step, *plan(step)), one.next_rows(step, *plan(step))
            assert ours.documents == theirs.documents
            for name in ("tokens_BT", "targets_BT", "segments_BT", "positions_BT"):
                assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
        assert several.state_dict() == one.state_dict()


def test_batches_that_streams_do_not_divide_serve_all_streams_in_turn() -> None:
    one, two = group(1, streams=4), group(2, streams=4)
    for step in range(6):
        assert global_batch(one, step, 6) == global_batch(two, step, 6)
    draws = {s: sum(state["draws"]) for s, state in one[0].state_dict()["streams"].items()}
    assert sorted(draws) == ["0", "1", "2", "3"]
    assert min(draws.values()) > 0
    assert merge_states([loader.state_dict() for loader in two]) == one[0].state_dict()


def test_prefetch_gives_the_same_batches_and_the_state_of_what_was_consumed() -> None:
    inline = loader_of()
    with loader_of(prefetch=3) as ahead:
        for step in range(9):
            ours, theirs = ahead.next_rows(step, *plan(step)), inline.next_rows(step, *plan(step))
            assert ours.documents == theirs.documents
            assert np.array_equal(ours.tokens_BT, theirs.tokens_BT)
            assert ahead.state_dict() == inline.state_dict()


def test_loading_a_state_drops_what_was_assembled_ahead() -> None:
    with loader_of(prefetch=3) as loader:
        loader.next_rows(0, 8, 0)
        state = loader.state_dict()
        first = loader.next_rows(1, 8, 0)
        loader.next_rows(2, 8, 0)
        loader.load_state_dict(state)
        assert loader.next_rows(1, 8, 0).documents == first.documents


def test_no_thread_outlives_its_loader() -> None:
    before = set(threading.enumerate())
    with loader_of(prefetch=2, workers=2) as loader:
        loader.next_rows(0, 8, 0)
        loader.next_rows(1, 8, 0)
        assert any(thread.name.startswith("loader") for thread in set(threading.enumerate()) - before)
    assert set(threading.enumerate()) <= before


class BrokenStore(FakeStore):
    broken = False

    def tokens(self, doc: int, start: int, stop: int) -> np.ndarray:
        if self.broken:
            raise OSError("the disk is gone")
        return super().tokens(doc, start, stop)


@pytest.mark.parametrize(("prefetch", "workers"), [(0, 1), (2, 1), (0, 2), (2, 2)])
def test_an_error_surfaces_in_the_step_and_leaves_the_state(prefetch: int, workers: int) -> None:
    store = BrokenStore([50] * 100, [0] * 100, ["a"])
    data = DataConfig(streams=2, buffer=4, prefetch=prefetch, workers=workers)
    with Loader(store, data, [Phase(name="p", tokens=100, weights={"a": 1.0})], SEQ_LEN, 0) as loader:
        loader.next_rows(0, 4, 0)
        state = json.dumps(loader.state_dict())
        store.broken = True
        with pytest.raises(OSError, match="the disk is gone"):
            [loader.next_rows(step, 4, 0) for step in range(1, 5)]
        store.broken = False
        if prefetch == 0:
            assert json.dumps(loader.state_dict()) == state
        with Loader(store, data, [Phase(name="p", tokens=100, weights={"a": 1.0})], SEQ_LEN, 0) as again:
            again.load_state_dict(loader.state_dict())
            assert again.next_rows(9, 4, 0).documents == loader.next_rows(9, 4, 0).documents


@pytest.mark.parametrize("prefetch", [0, 3])
def test_the_end_of_the_data_is_an_error_with_numbers(prefetch: int) -> None:
    store = store_of()
    tokens = int(store.lengths.sum())
    data = DataConfig(streams=2, buffer=4, max_epochs=1, prefetch=prefetch)
    phases = [Phase(name="all", tokens=tokens, weights={"a": 1.0, "b": 1.0, "c": 1.0})]
    served: Counter[int] = Counter()
    with Loader(store, data, phases, SEQ_LEN, 0) as loader:

        def read_on() -> None:
            for step in range(10_000):
                rows = loader.next_rows(step, 2, 0)
                served.update(rows.tokens_BT[rows.segments_BT >= 0].tolist())

        with pytest.raises(
            UserError, match=rf"the data end at step \d+: stream \d .* phase 'all' .* \({tokens:,} tokens"
        ):
            read_on()
        state = loader.state_dict()
    assert sum(served.values()) <= state["rows"] * SEQ_LEN  # the state after the last whole batch
    assert max(served.values()) == 1
    assert len(served) > 0.6 * tokens  # one stream ends before the other


def test_a_phase_begins_at_once_and_its_pool_waits_for_a_later_one() -> None:
    loader = loader_of(streams=1)

    def chunks_of(step: int, phase: int) -> list[tuple[str, int, int]]:
        store, rows = store_of(), loader.next_rows(step, 8, phase)
        chunks = [chunk for row in rows.documents for chunk in row]
        return [(store.domains[store.domain_ids[doc]], doc, start) for doc, start, _ in chunks]

    before = [chunk for step in range(4) for chunk in chunks_of(step, 0)]
    between = [chunk for step in range(4, 8) for chunk in chunks_of(step, 1)]
    after = [chunk for step in range(8, 12) for chunk in chunks_of(step, 0)]
    assert {domain for domain, _, _ in before + after} == {"a", "b"}
    assert {domain for domain, _, _ in between} == {"b", "c"}
    last = {doc: start for domain, doc, start in before if domain == "a"}
    goes_on = [start > last[doc] for domain, doc, start in after if domain == "a" and start and doc in last]
    assert all(goes_on)


def test_wrong_sizes_and_wrong_tokenizer_are_refused() -> None:
    with pytest.raises(UserError, match=r"3 data-parallel ranks cannot share data.streams = 8: .* \[1, 2, 4, 8\]"):
        loader_of(0, 3)
    with pytest.raises(UserError, match=r"step 7 has 10 rows, which 4 data-parallel ranks .* 8 or 12 rows"):
        loader_of(1, 4).next_rows(7, 10, 0)
    big = Phase(name="big", tokens=1_000_000, weights={"web": 1.0})
    half = Phase(name="half", tokens=20, weights={"web": 1.0})
    with pytest.raises(UserError, match=r"the phases ask for 40 tokens, but the domains hold 30"):
        Loader(FakeStore([4, 6]), DataConfig(max_epochs=3), [half, half], SEQ_LEN, 0)
    with pytest.raises(
        UserError, match=r"phase 'big' asks for 1,000,000 tokens, but the domains hold 30 in data.max_epochs = 3"
    ):
        Loader(FakeStore([4, 6]), DataConfig(max_epochs=3), [big], SEQ_LEN, 0)
    with pytest.raises(
        UserError,
        match=r"SHARDS were made with another tokenizer \(fingerprint aaaaaaaaaaaa\) than .* \(bbbbbbbbbbbb\)",
    ):
        Loader(store_of(), DataConfig(shards="SHARDS"), PHASES, SEQ_LEN, 0, tokenizer_fingerprint="b" * 64)
    Loader(store_of(), DataConfig(), PHASES, SEQ_LEN, 0, tokenizer_fingerprint="a" * 64).close()


def test_states_of_other_data_or_of_some_ranks_are_refused() -> None:
    loaders = group(2)
    state = loaders[0].state_dict()
    with pytest.raises(UserError, match=r"incomplete: streams \[1, 3, 5, 7\]"):
        loaders[0].load_state_dict(state)
    for options, name in [({"streams": 4}, "streams"), ({"packing": "concat"}, "packing")]:
        with pytest.raises(UserError, match=f"does not fit: it was written with {name} = "):
            loader_of(**options).load_state_dict(state)


def test_state_stays_under_a_mebibyte_at_8192_documents() -> None:
    store = FakeStore([40] * 30_000)
    phases = [Phase(name="p", tokens=1000, weights={"web": 1.0})]
    loader = Loader(store, DataConfig(buffer=8192, prefetch=0), phases, SEQ_LEN, 0)
    loader.next_rows(0, 64, 0)
    assert len(json.dumps(loader.state_dict(), indent=2)) < 1 << 20


def test_fingerprint_of_the_loader() -> None:
    variants: list[dict[str, Any]] = [{}, {"buffer": 21}, {"packing": "concat"}, {"streams": 4}]
    prints = {loader_of(**options).fingerprint for options in variants}
    assert len(prints) == 4
    assert loader_of(0, 1).fingerprint == loader_of(1, 2, prefetch=1).fingerprint


def test_rows_split_and_become_tensors() -> None:
    rows = loader_of(prefetch=0).next_rows(0, 8, 0)
    parts = rows.split(3)
    assert [len(part) for part in parts] == [3, 3, 2]
    assert np.array_equal(np.concatenate([part.tokens_BT for part in parts]), rows.tokens_BT)
    tensors = to_device(rows, "cpu")
    assert np.array_equal(tensors.segments_BT.numpy(), rows.segments_BT)
    assert str(tensors.tokens_BT.dtype) == "torch.int64"


def every_token(batches: list[Rows]) -> Counter[int]:
    return Counter(t for rows in batches for t in rows.tokens_BT[rows.segments_BT >= 0].tolist())


def test_validation_rows_are_fixed_and_whole() -> None:
    store = store_of()
    held_out = ValidationRows(store, SEQ_LEN, 5)
    assert held_out.domains == ["a", "b", "c"]
    for domain in held_out.domains:
        (whole,) = held_out.batches(domain, 5)
        (again,) = ValidationRows(store, SEQ_LEN, 5).batches(domain, 5)
        assert np.array_equal(whole.targets_BT, again.targets_BT)
        assert len(whole) == 5
        (fewer,) = ValidationRows(store, SEQ_LEN, 3).batches(domain, 5)
        assert fewer.documents == whole.documents[:3]
        for chunks in whole.documents:
            for doc, start, length in chunks:
                assert (start, length) == (0, min(SEQ_LEN, store.lengths[doc]))
                assert store.domains[store.domain_ids[doc]] == domain
        for num_ranks in (2, 4):
            parts = [list(held_out.batches(domain, 2, rank, num_ranks)) for rank in range(num_ranks)]
            assert len({tuple(len(rows) for rows in part) for part in parts}) == 1
            assert every_token([rows for part in parts for rows in part]) == every_token([whole])


def test_validation_leaves_out_empty_domains_and_takes_what_there_is() -> None:
    held_out = ValidationRows(FakeStore([5, 6, 7], [0, 0, 0], ["a", "none"]), 8, 10)
    assert held_out.domains == ["a"]
    (rows,) = held_out.batches("a", 10)
    assert len(rows) == 3
    assert (rows.targets_BT != IGNORE).sum() == 4 + 5 + 6


@pytest.mark.parametrize("packing", ["rsdb", "single"])
def test_rows_without_document_borders_are_one_segment(packing: str) -> None:
    kept, open_ = (loader_of(packing=packing, document_mask=mask).next_rows(0, 8, 0) for mask in (True, False))
    assert np.array_equal(kept.tokens_BT, open_.tokens_BT)
    assert np.array_equal(kept.targets_BT, open_.targets_BT)
    assert kept.documents == open_.documents
    assert np.array_equal(open_.segments_BT, np.where(kept.segments_BT < 0, -1, 0))
    places_BT = np.broadcast_to(np.arange(SEQ_LEN), open_.positions_BT.shape)
    assert np.array_equal(open_.positions_BT, np.where(kept.segments_BT < 0, 0, places_BT))
    assert kept.segments_BT.max() > 0 or packing == "single"
