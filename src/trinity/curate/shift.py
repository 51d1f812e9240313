"""How far the words of what was written are from the words of the sources: histograms over hashed words."""

import numpy as np

from trinity.curate.words import word_hashes

BINS = 4096


def add_words(counts_W: np.ndarray, text: str) -> None:
    """Count the words of a text by hash."""
    counts_W += np.bincount((word_hashes(text) % np.uint64(BINS)).astype(np.int64), minlength=BINS)


def divergence(one_W: np.ndarray, other_W: np.ndarray) -> float | None:
    """Jensen-Shannon divergence of two histograms in bits: 0 the same, 1 nothing in common; None if one is empty."""
    if one_W.sum() == 0 or other_W.sum() == 0:
        return None
    p, q = one_W / one_W.sum(), other_W / other_W.sum()
    middle = (p + q) / 2

    def from_middle(r: np.ndarray) -> float:
        some = r > 0
        return float((r[some] * np.log2(r[some] / middle[some])).sum())

    return (from_middle(p) + from_middle(q)) / 2
