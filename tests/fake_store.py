"""Tokenised documents in memory, in the shape that packing asks for."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class FakeStore:
    """Document d of length n has the tokens d * 10_000 + 1, ..., + n: a token names its document and its place."""

    tokenizer_fingerprint = "a" * 64

    def __init__(
        self,
        lengths: Sequence[int],
        domain_ids: Sequence[int] | None = None,
        domains: Sequence[str] = ("web",),
        sources: Sequence[str] | None = None,
    ):
        """`sources`: of each document."""
        assert max(lengths) < 10_000
        self.lengths = np.array(lengths, np.int64)
        self.domain_ids = np.array(domain_ids if domain_ids is not None else [0] * len(lengths), np.int32)
        self.domains = list(domains)
        given = sources if sources is not None else ["memory"] * len(lengths)
        self.sources = sorted(set(given))
        self.source_ids = np.array([self.sources.index(source) for source in given], np.int64)
        self.fingerprint = f"fake-{len(lengths)}-{int(self.lengths.sum())}"
        self._texts = [np.arange(1, n + 1, dtype=np.uint32) + d * 10_000 for d, n in enumerate(lengths)]

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    def tokens(self, doc: int, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self.lengths[doc]
        return self._texts[doc][start:stop]

    def describe(self, doc: int) -> dict[str, Any]:
        return {
            "source": self.sources[self.source_ids[doc]],
            "id": str(doc),
            "domain": self.domains[self.domain_ids[doc]],
            "offset": 0,
        }
