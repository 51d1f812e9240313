"""Near duplicates: MinHash signatures, bands that make candidates, and the groups that they form.

Broder, "On the resemblance and containment of documents" (1997): of two sets of shingles, the smallest values under a
random hash are equal with a probability that is their Jaccard similarity. Two documents become candidates when all
values of a band are equal (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", 3.4), and duplicates when the
share of equal values of the whole signature reaches the threshold.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from trinity.base.rng import bits, derive, mix
from trinity.config.curate import DuplicatesConfig
from trinity.curate.words import shingles, word_hashes

_AT_ONCE = 1 << 8  # shingles hashed together under all functions: what stays in a cache
EMPTY = np.uint32(0xFFFFFFFF)
"""All values of a text without words; such texts are no one's near duplicate."""
_COMPARED_AT_ONCE = 1 << 16


class Near(NamedTuple):
    """keeper_N[i] is the first document, in the order of the inputs, of the group that document i belongs to."""

    keeper_N: np.ndarray
    candidates: int
    """Pairs that a band brought together and that were compared."""


class Hasher:
    """Signatures under fixed hash functions."""

    def __init__(self, settings: DuplicatesConfig) -> None:
        self.settings = settings
        words = bits(derive(settings.seed, "minhash"), np.arange(2 * settings.permutations))
        self._factors, self._offsets = words[::2] | np.uint64(1), words[1::2]
        self._room = np.empty((settings.permutations, _AT_ONCE), np.uint64)

    def signature(self, text: str) -> np.ndarray:
        """[permutations] uint32: the upper halves of the smallest values."""
        return self.of_shingles(shingles(word_hashes(text), self.settings.ngram))

    def of_shingles(self, shingles_N: np.ndarray) -> np.ndarray:
        """As `signature`. Multiplication by an odd number, an offset and the upper half: each function is close to
        random on values that are already well mixed."""
        smallest = np.full(self.settings.permutations, np.uint64(0xFFFFFFFFFFFFFFFF))
        for start in range(0, len(shingles_N), _AT_ONCE):
            part = shingles_N[start : start + _AT_ONCE]
            values_PN = self._room[:, : len(part)]
            np.multiply(self._factors[:, None], part, out=values_PN)
            values_PN += self._offsets[:, None]
            np.minimum(smallest, values_PN.min(axis=1), out=smallest)
        return (smallest >> np.uint64(32)).astype(np.uint32)


def jaccard(one_N: np.ndarray, other_M: np.ndarray) -> float:
    """The similarity itself, of two arrays of shingles: the reference for the estimate."""
    shared = len(np.intersect1d(one_N, other_M))
    union = len(np.union1d(one_N, other_M))
    return shared / union if union else 0.0


def find_near(
    signatures_NP: np.ndarray, alive_N: np.ndarray, settings: DuplicatesConfig, progress: Callable[[int], object] = id
) -> Near:
    """Groups of near duplicates among the documents that are alive. `progress` is told how many bands are done.

    In each band, documents with equal values are compared with the first of them and with the one before them, so work
    grows with the number of documents, not with the size of a group. Memory: 16 bytes for each document beside the
    signatures, which may be a memory map.
    """
    total, rows = len(signatures_NP), settings.permutations // settings.bands
    alive = np.flatnonzero(alive_N)
    alive = alive[(signatures_NP[alive] != EMPTY).any(axis=1)] if len(alive) else alive
    parent = np.arange(total)
    compared = 0
    for band in range(settings.bands):
        keys = np.zeros(len(alive), np.uint64)
        for column in range(band * rows, (band + 1) * rows):
            keys = mix(keys ^ signatures_NP[alive, column].astype(np.uint64))
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1
        if len(same):
            opens = np.ones(len(order), bool)
            opens[same] = False
            firsts = np.maximum.accumulate(np.where(opens, np.arange(len(order)), 0))
            members = alive[order]
            pairs = np.concatenate(
                [np.stack([members[same], members[firsts[same]]], 1), np.stack([members[same], members[same - 1]], 1)]
            )
            pairs = np.unique(pairs, axis=0)
            compared += len(pairs)
            for later, earlier in pairs[_similar(signatures_NP, pairs, settings.threshold)]:
                _join(parent, int(later), int(earlier))
        progress(band + 1)
    keeper = np.arange(total)
    for document in np.flatnonzero(parent != keeper):
        keeper[document] = _root(parent, int(document))
    return Near(keeper, compared)


def _similar(signatures_NP: np.ndarray, pairs_C2: np.ndarray, threshold: float) -> np.ndarray:
    found = np.zeros(len(pairs_C2), bool)
    for start in range(0, len(pairs_C2), _COMPARED_AT_ONCE):
        part = slice(start, start + _COMPARED_AT_ONCE)
        one, other = pairs_C2[part].T
        found[part] = (signatures_NP[one] == signatures_NP[other]).mean(axis=1) >= threshold
    return found


def _root(parent_N: np.ndarray, document: int) -> int:
    while parent_N[document] != document:
        parent_N[document] = parent_N[parent_N[document]]
        document = int(parent_N[document])
    return document


def _join(parent_N: np.ndarray, one: int, other: int) -> None:
    one, other = _root(parent_N, one), _root(parent_N, other)
    parent_N[max(one, other)] = min(one, other)
