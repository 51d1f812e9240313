from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_store import FakeStore
from trinity.base.errors import UsageError, UserError
from trinity.config import Phase
from trinity.data.mixture import DocumentStream, Mixture


def mixture_of(store: FakeStore, *weights: dict[str, float], **options) -> Mixture:
    phases = [Phase(name=f"phase {i}", tokens=1, weights=w) for i, w in enumerate(weights)]
    return Mixture(store, phases, **({"streams": 1, "seed": 0, "max_epochs": 1} | options))


def skewed_store(seed: int = 0) -> FakeStore:
    """Many short, some middling, very few long documents."""
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(1, 50, 4000), *rng.integers(50, 800, 400), *rng.integers(3000, 9999, 40)]
    return FakeStore([int(n) for n in lengths], [0] * 4000 + [1] * 400 + [2] * 40, ["chat", "web", "books"])


def tokens_by_domain(store: FakeStore, documents: list[int]) -> np.ndarray:
    return np.bincount(store.domain_ids[documents], store.lengths[documents], minlength=len(store.domains))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32)
)
def test_every_document_comes_once_in_every_pass(domains: list[int], streams: int, epochs: int, seed: int) -> None:
    store = FakeStore([1 + d for d in range(len(domains))], domains, ["a", "b", "c"])
    weights = {store.domains[d]: 1.0 for d in set(domains)}
    mixture = mixture_of(store, weights, streams=streams, max_epochs=epochs, seed=seed)
    drawn = Counter(doc for s in range(streams) for doc in mixture.stream(s).draw(10_000))
    assert drawn == dict.fromkeys(range(len(domains)), epochs)


def test_a_pass_ends_before_the_next_begins() -> None:
    store = FakeStore([5] * 3000)
    stream = mixture_of(store, {"web": 1.0}, max_epochs=2).stream(0)
    first, second = stream.draw(3000), stream.draw(3000)
    assert sorted(first) == sorted(second) == list(range(3000))
    assert first != second
    assert first != sorted(first)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 8), st.sampled_from([0.0, 1.0]))
def test_a_stream_goes_on_from_its_state(before: int, after: int, streams: int, bias: float) -> None:
    store = skewed_store()
    options = {"streams": streams, "length_bias": bias, "max_epochs": 3}
    mixture = mixture_of(store, {"chat": 0.2, "books": 0.8}, {"web": 1.0, "books": 0.1}, **options)
    stream = mixture.stream(streams - 1)
    stream.draw(before)
    stream.set_phase(1)
    stream.draw(after)
    restored = mixture.stream(streams - 1)
    restored.load_state_dict(stream.state_dict())
    assert stream.draw(50) == restored.draw(50)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3), st.sampled_from([1, 4, 8]), st.integers(0, 1000))
def test_token_shares_follow_the_weights_whatever_the_lengths(weights: list[float], streams: int, seed: int) -> None:
    store = skewed_store()
    named = dict(zip(store.domains, weights, strict=True))
    mixture = mixture_of(store, named, streams=streams, max_epochs=1000, seed=seed)
    shares = np.array(weights) / sum(weights)
    for number in range(streams):
        stream = mixture.stream(number)
        documents: list[int] = []
        for _ in range(20):
            documents += stream.draw(100)
            tokens = tokens_by_domain(store, documents)
            # t_d / w_d of all domains lie around one virtual time, each off by at most a document
            assert (abs(tokens - shares * tokens.sum()) < 2 * 9999).all()


def test_the_start_of_all_streams_together_has_the_shares_already() -> None:
    store = skewed_store()
    streams = 64
    mixture = mixture_of(store, {"chat": 0.5, "web": 0.4, "books": 0.1}, streams=streams, max_epochs=1000)
    total = np.zeros(3)
    for number in range(streams):
        stream, documents = mixture.stream(number), []
        while store.lengths[documents].sum() < 10_000:  # one book or none
            documents += stream.draw(1)
        total += tokens_by_domain(store, documents)
    assert total / total.sum() == pytest.approx([0.5, 0.4, 0.1], abs=0.05)


def test_a_used_up_domain_leaves_and_the_others_share_its_part() -> None:
    store = FakeStore([10] * 20 + [10] * 2000 + [10] * 2000, [0] * 20 + [1] * 2000 + [2] * 2000, ["rare", "a", "b"])
    mixture = mixture_of(store, {"rare": 0.8, "a": 0.15, "b": 0.05}, max_epochs=2)
    documents = mixture.stream(0).draw(2000)
    rare, a, b = tokens_by_domain(store, documents)
    assert rare == 2 * 20 * 10
    assert a / b == pytest.approx(3.0, abs=0.05)


def test_phases_switch_the_shares_and_go_on_inside_the_domains() -> None:
    store = FakeStore([10] * 100, [0] * 50 + [1] * 50, ["a", "b"])
    stream = mixture_of(store, {"a": 1.0}, {"a": 0.5, "b": 0.5}).stream(0)
    first = stream.draw(20)
    stream.set_phase(1)
    second = stream.draw(60)
    assert tokens_by_domain(store, first).tolist() == [200, 0]
    assert tokens_by_domain(store, second).tolist() == [300, 300]
    assert len({*first, *second}) == 80


def test_length_bias_draws_by_odds_and_at_most_once_a_pass() -> None:
    store = FakeStore([100] * 4000 + [1000] * 400)
    stream = mixture_of(store, {"web": 1.0}, length_bias=1.0).stream(0)
    drawn = Counter(stream.draw(10_000))
    assert max(drawn.values()) == 1
    short, long = sum(doc < 4000 for doc in drawn), sum(doc >= 4000 for doc in drawn)
    assert long == 400  # odds 1000 / 1000
    assert abs(short - 400) < 5 * np.sqrt(4000 * 0.1 * 0.9)


def test_state_is_two_numbers_a_domain() -> None:
    stream: DocumentStream = mixture_of(skewed_store(), {"web": 1.0}).stream(0)
    stream.draw(300)
    assert stream.state_dict() == {
        "phase": 0,
        "counts": [0, 300, 0],
        "tokens": [0, stream.state_dict()["tokens"][1], 0],
    }


def test_passes_and_supply_count_tokens() -> None:
    store = FakeStore([10, 30, 5, 15], [0, 0, 1, 1], ["a", "b"])
    phases = [
        Phase(name="x", tokens=80, weights={"a": 3.0, "b": 1.0}),
        Phase(name="y", tokens=20, weights={"b": 1.0}),
    ]
    mixture = Mixture(store, phases, streams=1, seed=0, max_epochs=3)
    assert mixture.passes() == {"a": 1.5, "b": 2.0}
    assert (mixture.supply(0), mixture.supply(1), mixture.supply()) == (180, 60, 180)


def test_fingerprint_names_the_order() -> None:
    store = skewed_store()
    base = mixture_of(store, {"web": 1.0})
    others = [
        mixture_of(store, {"web": 0.5, "chat": 0.5}),
        mixture_of(store, {"web": 1.0}, seed=1),
        mixture_of(store, {"web": 1.0}, streams=2),
        mixture_of(store, {"web": 1.0}, max_epochs=2),
        mixture_of(store, {"web": 1.0}, length_bias=1.0),
        mixture_of(skewed_store(1), {"web": 1.0}),
    ]
    assert len({m.fingerprint for m in [base, *others]}) == 1 + len(others)
    assert base.fingerprint == mixture_of(store, {"web": 1.0}).fingerprint


def test_wrong_domains_are_refused() -> None:
    with pytest.raises(
        UsageError, match="'bokos', but the domains of the shards are chat, web, books; did you mean 'books'"
    ):
        mixture_of(skewed_store(), {"bokos": 1.0})
    with pytest.raises(UserError, match="'b', which has no documents"):
        mixture_of(FakeStore([3], [0], ["a", "b"]), {"b": 1.0})
