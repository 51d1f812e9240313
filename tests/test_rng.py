import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trinity.base.rng import Draws, bits, derive, uniform
from trinity.data.permutation import Permutation


def test_bits_are_splitmix64() -> None:
    # the published test vector of SplitMix64 with seed 1234567
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert bits(1234567, np.arange(5)).tolist() == expected


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(1, 2**40))
def test_draws_go_on_from_their_position(key: int, position: int, n: int) -> None:
    draws = Draws(key, position)
    values = [draws.below(n) for _ in range(5)]
    assert all(0 <= value < n for value in values)
    assert draws.position == position + 5
    again = Draws(key, position + 3)
    assert [again.below(n), again.below(n)] == values[3:]


def test_draws_cross_a_block_and_are_even() -> None:
    draws = Draws(derive(0, "test"))
    counts = np.bincount([draws.below(7) for _ in range(14_000)], minlength=7)
    assert abs(counts - 2000).max() < 5 * np.sqrt(2000)


def test_uniform_covers_the_unit_interval() -> None:
    values = uniform(derive(1), np.arange(10_000))
    assert 0 <= values.min() < 0.001
    assert 0.999 < values.max() < 1
    assert abs(values.mean() - 0.5) < 5 / np.sqrt(12 * 10_000)


def test_derived_keys_differ_by_every_part_and_by_type() -> None:
    keys = [
        derive(0),
        derive(1),
        derive(0, 1),
        derive(0, "1"),
        derive(0, 1, 2),
        derive(0, 12),
        derive(0, "a"),
        derive(0, "b"),
    ]
    assert len(set(keys)) == len(keys)


@given(st.integers(0, 2**64 - 1), st.integers(1, 5000))
def test_permutation_is_a_bijection(key: int, n: int) -> None:
    image = Permutation(key, n)(np.arange(n))
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(n))


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**62 - 1), st.lists(st.integers(0, 2**62), min_size=1, max_size=50))
def test_permutation_is_injective_and_random_access_at_any_size(key: int, n: int, places: list[int]) -> None:
    index = np.unique(np.array(places) % n)
    image = Permutation(key, n)(index)
    assert ((image >= 0) & (image < n)).all()
    assert len(np.unique(image)) == len(index)
    assert image[-1:] == Permutation(key, n)(index[-1:])


def test_permutations_of_many_keys_put_every_element_everywhere() -> None:
    n, keys = 7, 3500
    images = np.array([Permutation(derive(key), n)(np.arange(n)) for key in range(keys)])
    for place in range(n):
        counts = np.bincount(images[:, place], minlength=n)
        assert abs(counts - keys / n).max() < 5 * np.sqrt(keys / n)
