"""Words as numbers, signatures and near duplicates, against plain versions of the same."""

import re
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate_helpers import prose
from trinity.config.curate import DuplicatesConfig
from trinity.curate.minhash import Hasher, find_near, jaccard
from trinity.curate.shift import BINS, add_words, divergence
from trinity.curate.words import characters, shingles, word_hashes, word_spans

TEXTS = st.text(st.sampled_from("aA bÉé 1.,\n-_海は\u0e01\U0001f600\U00020000"), max_size=60)


def plain_words(text: str) -> list[str]:
    """The rule with a regular expression: characters of scripts without blanks alone, else runs of \\w but _."""
    alone = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    pattern = rf"(?=[^\W_])[{alone}]|(?:(?![{alone}])[^\W_]|[\U00010000-\U0001ffff])+"
    return re.findall(pattern, text.lower())


@given(TEXTS)
def test_words_are_those_of_a_regular_expression(text: str) -> None:
    chars = characters(text)
    starts, stops = word_spans(chars)
    lower = text.lower()
    assert [lower[a:b] for a, b in zip(starts, stops, strict=True)] == plain_words(text)


@given(TEXTS, TEXTS)
def test_equal_words_have_equal_numbers_and_others_not(one: str, other: str) -> None:
    both = plain_words(one) + plain_words(other)
    numbers = [*word_hashes(one).tolist(), *word_hashes(other).tolist()]
    assert len(numbers) == len(both)
    assert len(set(numbers)) == len(set(both))
    assert len(set(zip(numbers, both, strict=True))) == len(set(both))


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 6))
def test_shingles_are_runs_of_words(words: list[int], n: int) -> None:
    found = shingles(np.array(words, np.uint64), n).tolist()
    size = min(n, len(words))
    runs = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)] if words else []
    assert len(found) == len(runs)
    assert len(set(found)) == len(set(runs))
    assert len(set(zip(found, runs, strict=True))) == len(set(runs))


def test_the_share_of_equal_values_estimates_the_similarity() -> None:
    settings = DuplicatesConfig(permutations=512, bands=64, ngram=3)
    hasher = Hasher(settings)
    words = prose(0, 400).split()
    for changed in (0, 10, 40, 100, 399):
        other = [f"other{i}" if i % 400 < changed else word for i, word in enumerate(words)]
        texts = " ".join(words), " ".join(other)
        true = jaccard(*(np.unique(shingles(word_hashes(text), 3)) for text in texts))
        one, two = (hasher.signature(text) for text in texts)
        assert (one == two).mean() == pytest.approx(true, abs=4 * (0.25 / 512) ** 0.5)


def test_long_texts_are_hashed_in_parts_to_the_same_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    hasher = Hasher(DuplicatesConfig())
    whole = hasher.signature(prose(1, 300))
    monkeypatch.setattr("trinity.curate.minhash._AT_ONCE", 7)
    assert np.array_equal(hasher.signature(prose(1, 300)), whole)


def brute_force(signatures: np.ndarray, alive: np.ndarray, threshold: float) -> np.ndarray:
    """Groups by comparing all pairs."""
    group = np.arange(len(signatures))
    for one, other in combinations(np.flatnonzero(alive), 2):
        if (signatures[one] == signatures[other]).mean() >= threshold:
            first, second = sorted((group[one], group[other]))
            group[group == second] = first
    return group


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), max_size=14), st.integers(0, 2**14))
def test_groups_are_those_of_all_pairs(documents: list[tuple[int, int]], dead: int) -> None:
    """Not all pairs are compared, so groups may be smaller than of all pairs, but never larger."""
    config = DuplicatesConfig(permutations=32, bands=32, threshold=0.5, ngram=1)
    hasher = Hasher(config)
    texts = [" ".join(prose(seed, 30).split()[: 30 - cut]) for seed, cut in documents]
    signatures = np.stack([hasher.signature(t) for t in texts]) if texts else np.zeros((0, 32), np.uint32)
    alive = np.array([not dead >> i & 1 for i in range(len(texts))], bool)
    found = find_near(signatures, alive, config).keeper_N
    expected = brute_force(signatures, alive, 0.5)
    assert (found[~alive] == np.flatnonzero(~alive)).all()
    for one, other in combinations(range(len(texts)), 2):
        if found[one] == found[other]:
            assert expected[one] == expected[other]
        if np.array_equal(signatures[one], signatures[other]) and alive[one] and alive[other]:
            assert found[one] == found[other]


def test_texts_without_words_are_no_ones_duplicates() -> None:
    config = DuplicatesConfig()
    hasher = Hasher(config)
    signatures = np.stack([hasher.signature(text) for text in ("", "...", "a b c", "a b c")])
    assert find_near(signatures, np.ones(4, bool), config).keeper_N.tolist() == [0, 1, 2, 2]


def test_divergence_is_zero_for_the_same_words_and_one_for_no_common_ones() -> None:
    one, other, both = (np.zeros(BINS, np.int64) for _ in range(3))
    add_words(one, "sea sea harbour")
    add_words(other, "mountain valley")
    add_words(both, "sea sea harbour mountain valley mountain valley mountain valley")
    assert divergence(one, 7 * one) == pytest.approx(0)
    assert divergence(one, other) == pytest.approx(1)
    middle = divergence(one, both)
    assert middle is not None
    assert 0.1 < middle < 0.9
    assert divergence(one, np.zeros(BINS, np.int64)) is None
