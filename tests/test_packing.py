import json
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_store import FakeStore
from trinity.config import Phase
from trinity.data.mixture import DocumentStream, Mixture
from trinity.data.packing import BestFit, Concat
from trinity.data.rows import IGNORE, Chunk, Packer, Rows, empty_rows, finish_row
from trinity.data.rsdb import RSDB, ReferenceRSDB, divide

Make = Callable[[FakeStore, DocumentStream, int], Packer]
PACKERS: dict[str, Make] = {
    "rsdb": lambda store, source, size: RSDB(store, source, size, key=7),
    "concat": lambda store, source, size: Concat(store, source),
    "single": lambda store, source, size: Concat(store, source, several=False),
    "best-fit": lambda store, source, size: BestFit(store, source, size, key=7),
}
lengths_of_documents = st.lists(st.one_of(st.integers(1, 6), st.integers(1, 90)), min_size=1, max_size=40)


def store_of(lengths: list[int]) -> FakeStore:
    """Short and long documents in two domains."""
    domains = ["short", "long"] if min(lengths) < 10 <= max(lengths) else ["all"]
    return FakeStore(lengths, [int(len(domains) == 2 and n >= 10) for n in lengths], domains)


def source_of(store: FakeStore, streams: int = 1, stream: int = 0, epochs: int = 1) -> DocumentStream:
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
    store = store_of(lengths)
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
    store = store_of(lengths)
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
    store = store_of(lengths)
    fast = RSDB(store, source_of(store, epochs=2), size, key=5)
    plain = ReferenceRSDB(store, source_of(store, epochs=2), size, key=5)
    ours, theirs = fill(fast, seq_len, 300), fill(plain, seq_len, 300)
    assert ours.documents == theirs.documents
    assert np.array_equal(ours.tokens_BT, theirs.tokens_BT)
    assert np.array_equal(ours.targets_BT, theirs.targets_BT)


def test_rsdb_refills_in_bulk_at_the_low_water_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FakeStore([10] * 100)
    source, asked, draw = source_of(store), [], DocumentStream.draw_from
    monkeypatch.setattr(DocumentStream, "draw_from", lambda self, d, n: asked.append(n) or draw(self, d, n))
    packer = RSDB(store, source, size=8, key=0)
    fill(packer, 70, 1)
    assert asked == [16]
    fill(packer, 10, 1)
    assert asked == [16, 8]


def test_rsdb_spreads_a_long_document_over_distant_rows() -> None:
    store = FakeStore([9000] + [32] * 3000)
    rows = fill(RSDB(store, source_of(store, epochs=3), size=64, key=1), 32, 4000)
    starts = {}
    for row, chunks in enumerate(rows.documents):
        starts |= {start: row for doc, start, _ in chunks if doc == 0}
    gaps = np.diff(list(starts.values()))
    assert len(gaps) > 20
    assert gaps.mean() > 20  # one of 64 to 128 documents is picked for each chunk
    assert list(starts) == sorted(starts)


def test_rsdb_serves_the_shares_at_any_time_whatever_the_lengths() -> None:
    lengths, ids = [5000] * 12 + [40] * 8000 + [300] * 900, [0] * 12 + [1] * 8000 + [2] * 900
    store = FakeStore(lengths, ids, ["books", "chat", "web"])
    shares = np.array([0.5, 0.3, 0.2])
    phases = [
        Phase(name="x", tokens=1, weights={"books": 5.0, "chat": 3.0, "web": 2.0}),
        Phase(name="y", tokens=1, weights={"chat": 1.0, "web": 1.0}),
    ]
    source = Mixture(store, phases, streams=1, seed=0, max_epochs=100).stream(0)
    packer, served = RSDB(store, source, size=50, key=0), np.zeros(3)
    for _ in range(60):
        for chunks in fill(packer, 256, 5).documents:
            for doc, _, length in chunks:
                served[store.domain_ids[doc]] += length
        assert (abs(served - shares * served.sum()) <= 2 * 256).all()
    source.set_phase(1)
    domains = [store.domain_ids[doc] for chunks in fill(packer, 256, 20).documents for doc, _, _ in chunks]
    assert set(domains) == {1, 2}  # a phase begins at once


def test_a_pool_is_divided_by_shares_and_never_exceeds_a_pass() -> None:
    store = FakeStore([1] * 100 + [1] * 7 + [1] * 500, [0] * 100 + [1] * 7 + [2] * 500, ["a", "b", "c"])

    def sizes(size: int, weights: dict[str, float]) -> list[int]:
        phases = [Phase(name="x", tokens=1, weights=weights)]
        return divide(size, Mixture(store, phases, streams=1, seed=0, max_epochs=9).stream(0))

    assert sizes(10, {"a": 1.0, "c": 2.0}) == [3, 0, 7]
    assert sizes(100, {"a": 0.2, "b": 0.3, "c": 0.5}) == [20, 3, 50]
    assert sizes(1, {"a": 1.0, "b": 1.0, "c": 8.0}) == [1, 1, 1]
    assert sizes(400, {"a": 1.0}) == [50, 0, 0]


def test_best_fit_cuts_only_what_is_longer_than_a_row() -> None:
    store = FakeStore(np.random.default_rng(0).integers(1, 100, 500).tolist())
    rows = fill(BestFit(store, source_of(store), size=64, key=0), 64)
    for chunks in rows.documents:
        for doc, start, length in chunks:
            assert start == 0 or store.lengths[doc] > 64
            assert start + length == store.lengths[doc] or length == 64
    padding = (rows.segments_BT == -1).mean()
    assert padding < 0.05


class InOrder:
    """Documents 0, 1, 2."""

    def draw(self, count: int) -> list[int]:
        drawn, self.left = self.left[:count], self.left[count:]
        return drawn

    def __init__(self) -> None:
        self.left = [0, 1, 2]

    def state_dict(self) -> dict[str, Any]:
        return {"left": self.left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left = state["left"]


def test_single_rows_hold_one_document() -> None:
    store = FakeStore([3, 40, 16])
    rows = fill(Concat(store, InOrder(), several=False), 16)
    assert rows.documents == [[(0, 0, 3)], [(1, 0, 16)], [(1, 16, 16)], [(1, 32, 8)], [(2, 0, 16)]]


def test_concat_keeps_the_order() -> None:
    store = FakeStore([3, 40, 16])
    rows = fill(Concat(store, InOrder()), 16)
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
