"""Words of a text as numbers, without a loop over them in Python.

A word is a run of letters, marks and digits in lower case; in scripts without blanks each character is one. A word's
number is a polynomial hash, taken for all words at once from prefix sums modulo 2**64.
"""

import functools
import unicodedata

import numpy as np

from trinity.base.rng import mix

_BASE = 0x9E3779B97F4A7C15  # odd, hence invertible modulo 2**64
_OUTSIDE, _INSIDE, _ALONE = 0, 1, 2
_ALONE_RANGES = (
    (0x0E00, 0x0F00),  # Thai, Lao
    (0x1000, 0x10A0),  # Burmese
    (0x1780, 0x1800),  # Khmer
    (0x2E80, 0x3100),  # radicals, kana
    (0x3400, 0xA000),  # Han
    (0xF900, 0xFB00),
)
_PLANE = 0x10000
_POWERS_AT_ONCE = 1 << 16


def characters(text: str) -> np.ndarray:
    """Code points of the text in lower case, [n] uint32; half surrogate pairs become question marks."""
    return np.frombuffer(text.lower().encode("utf-32-le", "replace"), np.uint32)


def word_spans(chars_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first, one past the last) character of each word, in order."""
    kinds = _kinds()[np.minimum(chars_N, _PLANE - 1)]
    beyond = chars_N >= _PLANE
    if beyond.any():  # further planes: Han stands alone, all else makes words
        kinds = np.where(beyond, np.where((chars_N >= 0x20000) & (chars_N < 0x40000), _ALONE, _INSIDE), kinds)
    before = np.concatenate([[_OUTSIDE], kinds[:-1]])
    after = np.concatenate([kinds[1:], [_OUTSIDE]])
    starts = np.flatnonzero((kinds == _ALONE) | ((kinds == _INSIDE) & (before != _INSIDE)))
    stops = np.flatnonzero((kinds == _ALONE) | ((kinds == _INSIDE) & (after != _INSIDE))) + 1
    return starts, stops


def word_hashes(text: str) -> np.ndarray:
    """A 64-bit number of each word, [n] uint64; equal words have equal numbers."""
    chars = characters(text)
    starts, stops = word_spans(chars)
    powers, inverses = _powers(len(chars) + 1)
    sums = np.zeros(len(chars) + 1, np.uint64)
    np.cumsum((chars.astype(np.uint64) + np.uint64(1)) * powers[: len(chars)], out=sums[1:])
    return mix((sums[stops] - sums[starts]) * inverses[starts])


def shingles(hashes_N: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit number of every run of n words, repeated ones included; a text of fewer words is one run."""
    if len(hashes_N) == 0:
        return hashes_N
    n = min(n, len(hashes_N))
    count = len(hashes_N) - n + 1
    total = np.zeros(count, np.uint64)
    for offset in range(n):
        total = total * np.uint64(_BASE) + hashes_N[offset : offset + count]
    return mix(total)


@functools.cache
def _kinds() -> np.ndarray:
    """What each character of the basic plane is, [65536] uint8."""
    kinds = np.array([unicodedata.category(chr(c))[0] in "LMN" for c in range(_PLANE)], np.uint8)
    for first, stop in _ALONE_RANGES:
        kinds[first:stop][kinds[first:stop] == _INSIDE] = _ALONE
    kinds[0x3040:0x3100][kinds[0x3040:0x3100] == _INSIDE] = _ALONE
    return kinds


_power_tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}


def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers of the base and of its inverse modulo 2**64, at least `count` of each."""
    size = _POWERS_AT_ONCE
    while size < count:
        size *= 2
    if size not in _power_tables:
        tables = []
        for base in (_BASE, pow(_BASE, -1, 1 << 64)):
            steps = np.full(size, base, np.uint64)
            steps[0] = 1
            tables.append(np.cumprod(steps))
        _power_tables.clear()
        _power_tables[size] = (tables[0], tables[1])
    return _power_tables[size]
