"""Random numbers by counter: the number at (key, counter) is a pure function of both, on every machine.

No global state and nothing to save but a position. The generator is SplitMix64 (Steele, Lea, Flood: "Fast splittable
pseudorandom number generators", 2014) read at random positions; integer arithmetic only, so results never depend on a
library's version.
"""

import hashlib

import numpy as np

_WEYL = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 1024


def derive(seed: int, *path: int | str) -> int:
    """A 64-bit key for one purpose, such as `derive(seed, "rsdb", stream)`; different paths are independent."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64 words of any shape: a bijection, each input bit reaches every output bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def bits(key: int, counters: np.ndarray) -> np.ndarray:
    """Uniform uint64 words at `counters` (integers >= 0, any shape with at least one axis)."""
    return mix(np.uint64(key) + (counters.astype(np.uint64) + np.uint64(1)) * _WEYL)


def uniform(key: int, counters: np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1) at `counters`."""
    return (bits(key, counters) >> np.uint64(11)) * 2.0**-53


class Draws:
    """Single draws in order from one key; `position` is all its state."""

    def __init__(self, key: int, position: int = 0) -> None:
        self._key = key
        self._words: list[int] = []
        self._first = 0
        self.position = position

    def below(self, n: int) -> int:
        """The next integer in [0, n)."""
        value = self.peek(n)
        self.position += 1
        return value

    def peek(self, n: int) -> int:
        """What `below` would give, by multiply and shift; off uniform by less than n / 2**64. `position` stays."""
        at = self.position - self._first
        if not 0 <= at < len(self._words):
            self._first, at = self.position, 0
            self._words = bits(self._key, np.arange(self._first, self._first + _BLOCK)).tolist()
        return (self._words[at] * n) >> 64
