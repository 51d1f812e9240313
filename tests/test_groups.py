"""Weights that name domains, or documents by their sources."""

from collections import Counter
from fnmatch import fnmatchcase

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_store import FakeStore
from trinity.base.errors import UsageError, UserError
from trinity.config import DataConfig, Phase
from trinity.data.groups import group_documents
from trinity.data.loader import Loader
from trinity.data.mixture import Mixture

SOURCES = ["books/a.txt", "books/b.txt", "web/2023/x.jsonl", "web/2024/y.jsonl", "web/2024/z.jsonl"]
DOMAINS = ["prose", "crawl"]


def store_of(sources: list[int]) -> FakeStore:
    names = [SOURCES[number] for number in sources]
    return FakeStore(
        [5 + number for number in range(len(sources))], [n.startswith("web") for n in names], DOMAINS, names
    )


def phase(weights: dict[str, float], name: str = "p") -> Phase:
    return Phase(name=name, tokens=1, weights=weights)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.sampled_from(["source:books/*", "source:*2024*", "source:web/2023/?.jsonl", "source:*/[xy].jsonl", "source:*"]),
    st.integers(1, 4),
)
def test_a_pattern_takes_its_documents_out_of_their_domains(sources: list[int], key: str, epochs: int) -> None:
    store = store_of(sources)
    mine = {d for d, n in enumerate(sources) if fnmatchcase(SOURCES[n], key.removeprefix("source:"))}
    rest = {name: {d for d in range(len(sources)) if DOMAINS[store.domain_ids[d]] == name} - mine for name in DOMAINS}
    weights = {key: 1.0} if mine else {}
    weights |= {name: 1.0 for name, members in rest.items() if members}
    groups = group_documents(store, [phase(weights)])
    assert {name: set(members.tolist()) for name, members in groups.items()} == rest | ({key: mine} if mine else {})
    mixture = Mixture(store, [phase(weights)], streams=2, seed=1, max_epochs=epochs)
    drawn = Counter(doc for s in range(2) for doc in mixture.stream(s).draw(10_000))
    assert drawn == dict.fromkeys(range(len(sources)), epochs)


def test_tokens_follow_the_weights_of_sources() -> None:
    store = FakeStore([50] * 3000, [0] * 3000, ["web"], ["a/1"] * 1000 + ["b/2"] * 1000 + ["c/3"] * 1000)
    weights = {"source:a/*": 0.7, "source:b/*": 0.2, "web": 0.1}
    drawn = Mixture(store, [phase(weights)], streams=1, seed=0, max_epochs=1).stream(0).draw(1000)
    counts = np.bincount([doc // 1000 for doc in drawn], minlength=3)
    assert np.abs(counts - [700, 200, 100]).max() <= 1


def test_a_pattern_of_one_phase_holds_in_all() -> None:
    store = store_of([0, 1, 2, 3, 4])
    phases = [phase({"prose": 1.0, "crawl": 1.0}, "first"), phase({"source:web/2024/*": 1.0}, "second")]
    mixture = Mixture(store, phases, streams=1, seed=0, max_epochs=1)
    stream = mixture.stream(0)
    assert sorted(stream.draw(10)) == [0, 1, 2]  # the other two wait for their phase
    stream.set_phase(1)
    assert sorted(stream.draw(10)) == [3, 4]


def test_what_names_nothing_is_refused() -> None:
    store = store_of([0, 1, 2])
    with pytest.raises(UsageError, match=r"'source:boks/\*'.*no source of the shards matches.*books/a\.txt"):
        group_documents(store, [phase({"source:boks/*": 1.0})])
    with pytest.raises(UsageError, match=r"domain 'proze'.*prose, crawl.*did you mean 'prose'.*source:PATTERN"):
        group_documents(store, [phase({"proze": 1.0})])
    with pytest.raises(UserError, match=r"'source:\*' and 'source:books/\*' both name some documents"):
        group_documents(store, [phase({"source:*": 1.0}, "a"), phase({"source:books/*": 1.0}, "b")])
    with pytest.raises(
        UserError, match=r"domain 'prose', which has no documents in the shards outside of source:books"
    ):
        group_documents(store, [phase({"source:books/*": 1.0, "prose": 1.0})])


def test_a_state_of_other_groups_is_refused() -> None:
    store = FakeStore([20] * 40, [0] * 40, ["web"], ["a/1"] * 20 + ["b/2"] * 20)
    settings_ = DataConfig(streams=2, buffer=4, prefetch=0)

    def loader(weights: dict[str, float]) -> Loader:
        return Loader(store, settings_, [phase(weights)], 8, 0)

    plain = loader({"web": 1.0})
    plain.next_rows(0, 2, 0)
    state = plain.state_dict()
    with pytest.raises(UserError, match=r"does not fit: it was written with groups = \['web'\]"):
        loader({"source:a/*": 1.0}).load_state_dict(state)
    del state["order"]["groups"]  # as states were once
    again = loader({"web": 1.0})
    again.load_state_dict(state)
    assert np.array_equal(again.next_rows(1, 2, 0).tokens_BT, plain.next_rows(1, 2, 0).tokens_BT)
