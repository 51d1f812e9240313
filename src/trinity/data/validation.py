"""Held-out rows that are the same at every evaluation of every run."""

from collections.abc import Iterator

import numpy as np

from trinity.base.rng import derive
from trinity.data.permutation import Permutation
from trinity.data.rows import Chunk, DocumentStore, Rows, copy_chunk, empty_rows, finish_row


class ValidationRows:
    """Up to `rows_per_domain` rows of T = `seq_len` tokens from each domain of a held-out store.

    A row holds the beginnings (T tokens at most) of as many documents as fit whole, in a fixed pseudorandom order. The
    rows depend on the documents and on T only; fewer rows are a prefix of more.
    """

    def __init__(self, store: DocumentStore, seq_len: int, rows_per_domain: int) -> None:
        self._store, self._seq_len = store, seq_len
        self._rows = {name: self._plan(number, rows_per_domain) for number, name in enumerate(store.domains)}

    @property
    def domains(self) -> list[str]:
        """Domains that have held-out documents."""
        return [name for name, rows in self._rows.items() if rows]

    def _plan(self, domain: int, most: int) -> list[list[Chunk]]:
        documents = np.flatnonzero(self._store.domain_ids == domain)
        if not len(documents):
            return []
        order = Permutation(derive(0, "validation", self._store.domains[domain]), len(documents))
        rows: list[list[Chunk]] = [[]]
        space = self._seq_len
        for doc in documents[order(np.arange(len(documents)))].tolist():
            length = min(int(self._store.lengths[doc]), self._seq_len)
            if length > space:
                if len(rows) == most:
                    break
                rows.append([])
                space = self._seq_len
            rows[-1].append(Chunk(doc, 0, length))
            space -= length
        return rows

    def batches(self, domain: str, micro_rows: int, rank: int = 0, num_ranks: int = 1) -> Iterator[Rows]:
        """The rows of a domain that are this rank's, `micro_rows` at a time.

        Every rank has as many batches of the same sizes as the others; where rows are missing it gets padding.
        """
        planned = self._rows[domain]
        per_rank = -(-len(planned) // num_ranks)
        mine = planned[rank::num_ranks]
        for start in range(0, per_rank, micro_rows):
            rows = empty_rows(min(micro_rows, per_rank - start), self._seq_len)
            for row in range(len(rows)):
                at, chunks = 0, mine[start + row] if start + row < len(mine) else []
                for chunk in chunks:
                    is_end = chunk.length == self._store.lengths[chunk.doc]
                    copy_chunk(self._store, chunk, is_end, at, rows.tokens_BT[row], rows.targets_BT[row])
                    at += chunk.length
                finish_row(rows, row, chunks)
            yield rows
