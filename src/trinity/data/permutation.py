"""A pseudorandom order of n things in O(1) memory: element i of it costs a few multiplications.

A balanced Feistel network permutes [0, 4**h), the smallest such range that holds n; a value outside [0, n) is encrypted
again until it falls inside (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), which
takes fewer than 4 rounds on average.
"""

import numpy as np

from trinity.base.rng import bits, mix

_ROUNDS = 6


class Permutation:
    """A bijection of [0, n) chosen by `key`; 1 <= n < 2**62."""

    def __init__(self, key: int, n: int) -> None:
        assert 1 <= n < 1 << 62, n
        self.n = n
        half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._half = np.uint64(half)
        self._mask = np.uint64((1 << half) - 1)
        self._round_keys = bits(key, np.arange(_ROUNDS))

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Where each index (int64 in [0, n), one axis) goes, as int64."""
        out = self._encrypt(index.astype(np.uint64))
        outside = np.flatnonzero(out >= self.n)
        while outside.size:
            out[outside] = self._encrypt(out[outside])
            outside = outside[out[outside] >= self.n]
        return out.astype(np.int64)

    def _encrypt(self, words: np.ndarray) -> np.ndarray:
        left, right = words >> self._half, words & self._mask
        for key in self._round_keys:
            left, right = right, left ^ (mix(right + key) & self._mask)
        return (left << self._half) | right
