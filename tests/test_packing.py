import json
from collections.abc import Callable
from typing import Protocol

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_store import FakeStore
from trinity.config import Phase
from trinity.data.mixture import Mixture
from trinity.data.packing import BestFit, Concat
from trinity.data.rows import IGNORE, Chunk, Packer, Rows, empty_rows, finish_row
from trinity.data.rsdb import RSDB, DocumentSource, ReferenceRSDB

Make = Callable[[FakeStore, DocumentSource, int], Packer]
PACKERS: dict[str, Make] = {
    "rsdb": lambda store, source, size: RSDB(store, source, size, key=7),
    "concat": lambda store, source, size: Concat(store, source),
    "single": lambda store, source, size: Concat(store, source, several=False),
    "best-fit": lambda store, source, size: BestFit(store, source, size, key=7),
}
lengths_of_documents = st.lists(st.one_of(st.integers(1, 6), st.integers(1, 90)), min_size=1, max_size=40)


def source_of(store: FakeStore, streams: int = 1, stream: int = 0, epochs: int = 1) -> DocumentSource:
    phases = [Phase(name="only", tokens=1, weights=dict.fromkeys(store.domains, 1.0))]
    return Mixture(store, phases, streams=streams, seed=3, max_epochs=epochs).stream(stream)


class Filler(Protocol):
    def fill(self, tokens_T: np.ndarray, targets_T: np.ndarray) -> list[Chunk]: ...


def fill(packer: Filler, seq_len: int, most: int = 10_000) -> Rows:
    """Rows until the documents are used up."""
    rows = empty_rows(most, seq_len)
    for row in range(most):
        chunks = packer.fill(rows.tokens_BT[row], rows.targets_BT[row])
        if not chunks:
            return rows[:row]
        finish_row(rows, row, chunks)
    return rows


def check_rows(store: FakeStore, rows: Rows) -> None:
    """Each array says what the chunks say."""
    for row, chunks in enumerate(rows.documents):
        at = 0
        for number, (doc, start, length) in enumerate(chunks):
            text = store.tokens(doc, 0, int(store.lengths[doc])).tolist()
            span = slice(at, at + length)
            assert rows.tokens_BT[row, span].tolist() == text[start : start + length]
            assert rows.targets_BT[row, span].tolist() == [*text[1:], IGNORE][start : start + length]
            assert (rows.segments_BT[row, span] == number).all()
            assert rows.positions_BT[row, span].tolist() == list(range(length))
            at += length
        assert (rows.segments_BT[row, at:] == -1).all()
        assert (rows.targets_BT[row, at:] == IGNORE).all()


@pytest.mark.parametrize("name", PACKERS)
@settings(max_examples=40, deadline=None)
@given(lengths=lengths_of_documents, size=st.integers(1, 12), seq_len=st.integers(1, 70), streams=st.integers(1, 3))
def test_every_token_is_an_input_once_and_a_target_once(
    name: str, lengths: list[int], size: int, seq_len: int, streams: int
) -> None:
    store = FakeStore(lengths)
    all_rows = [fill(PACKERS[name](store, source_of(store, streams, s), size), seq_len, 2000) for s in range(streams)]
    for rows in all_rows:
        check_rows(store, rows)
    inputs = np.concatenate([rows.tokens_BT[rows.segments_BT >= 0] for rows in all_rows])
    targets = np.concatenate([rows.targets_BT[rows.targets_BT != IGNORE] for rows in all_rows])
    tokens = [store.tokens(doc, 0, n) for doc, n in enumerate(lengths)]
    assert np.array_equal(np.sort(inputs), np.concatenate(tokens))
    assert np.array_equal(np.sort(targets), np.concatenate([text[1:] for text in tokens]))


@pytest.mark.parametrize("name", PACKERS)
@settings(max_examples=20, deadline=None)
@given(lengths=lengths_of_documents, size=st.integers(1, 12), before=st.integers(0, 30))
def test_a_packer_goes_on_from_its_state(name: str, lengths: list[int], size: int, before: int) -> None:
    store = FakeStore(lengths)
    packer = PACKERS[name](store, source_of(store, epochs=20), size)
    fill(packer, 16, before)
    restored = PACKERS[name](store, source_of(store, epochs=20), size)
    restored.load_state_dict(json.loads(json.dumps(packer.state_dict())))
    ours, theirs = fill(packer, 16, 20), fill(restored, 16, 20)
    assert ours.documents == theirs.documents
    assert np.array_equal(ours.targets_BT, theirs.targets_BT)


@settings(max_examples=40, deadline=None)
@given(lengths=lengths_of_documents, size=st.integers(1, 12), seq_len=st.integers(1, 70))
def test_rsdb_equals_its_reference(lengths: list[int], size: int, seq_len: int) -> None:
    store = FakeStore(lengths)
    fast = RSDB(store, source_of(store, epochs=2), size, key=5)
    plain = ReferenceRSDB(store, source_of(store, epochs=2), size, key=5)
    ours, theirs = fill(fast, seq_len, 300), fill(plain, seq_len, 300)
    assert ours.documents == theirs.documents
    assert np.array_equal(ours.tokens_BT, theirs.tokens_BT)
    assert np.array_equal(ours.targets_BT, theirs.targets_BT)


class CountingSource:
    """Documents 0, 1, 2, ...; remembers how many were asked for at a time."""

    def __init__(self, num_documents: int) -> None:
        self.left, self.next, self.asked = num_documents, 0, []

    def draw(self, count: int) -> list[int]:
        self.asked.append(count)
        count = min(count, self.left)
        self.left, self.next = self.left - count, self.next + count
        return list(range(self.next - count, self.next))

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def test_rsdb_refills_in_bulk_at_the_low_water_mark() -> None:
    store, source = FakeStore([10] * 100), CountingSource(100)
    packer = RSDB(store, source, size=8, key=0)
    fill(packer, 10, 1)
    assert source.asked == [16]
    fill(packer, 80, 1)
    fill(packer, 10, 1)
    assert source.asked == [16, 8]


def test_rsdb_spreads_a_long_document_over_distant_rows() -> None:
    store = FakeStore([9000] + [32] * 3000)
    rows = fill(RSDB(store, CountingSource(3001), size=64, key=1), 32, 2000)
    with_long = [row for row, chunks in enumerate(rows.documents) if any(doc == 0 for doc, _, _ in chunks)]
    gaps = np.diff(with_long)
    assert gaps.mean() > 20  # one of 64 to 128 documents is picked for each chunk, so about every 50th row
    starts = [start for chunks in rows.documents for doc, start, _ in chunks if doc == 0]
    assert starts == sorted(starts)


def test_best_fit_cuts_only_what_is_longer_than_a_row() -> None:
    store = FakeStore(np.random.default_rng(0).integers(1, 100, 500).tolist())
    rows = fill(BestFit(store, source_of(store), size=64, key=0), 64)
    for chunks in rows.documents:
        for doc, start, length in chunks:
            assert start == 0 or store.lengths[doc] > 64
            assert start + length == store.lengths[doc] or length == 64
    padding = (rows.segments_BT == -1).mean()
    assert padding < 0.05


def test_single_rows_hold_one_document() -> None:
    store = FakeStore([3, 40, 16])
    rows = fill(Concat(store, CountingSource(3), several=False), 16)
    assert rows.documents == [[(0, 0, 3)], [(1, 0, 16)], [(1, 16, 16)], [(1, 32, 8)], [(2, 0, 16)]]


def test_concat_keeps_the_order() -> None:
    store = FakeStore([3, 40, 16])
    rows = fill(Concat(store, CountingSource(3)), 16)
    assert rows.documents == [
        [(0, 0, 3), (1, 0, 13)],
        [(1, 13, 16)],
        [(1, 29, 11), (2, 0, 5)],
        [(2, 5, 11)],
    ]


def test_rsdb_state_is_small() -> None:
    store = FakeStore([100] * 20_000)
    packer = RSDB(store, source_of(store), size=8192, key=0)
    fill(packer, 128, 10)
    assert len(json.dumps(packer.state_dict())) < 400_000
