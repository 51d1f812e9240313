"""Which positions of a row each rank of a context group holds, and which keys it needs beside its own.

A row of T tokens is cut into equal chunks. `contiguous` gives rank r chunk r of R. `zigzag` cuts 2R chunks and gives
rank r the chunks r and 2R - 1 - r: under a causal mask an early chunk costs little and a late one much, so every rank
has the same number of scores in global layers (contiguous: the last rank has 2 - 1/R times the mean), for twice the
number of windows to exchange in local layers. Pure arithmetic, the same on every rank.
"""

import functools
from dataclasses import dataclass

import numpy as np

from trinity.base.errors import UsageError
from trinity.config.parallel import ContextOrder
from trinity.data.rows import Rows


@dataclass(frozen=True)
class RowSplit:
    """Rows of `seq_len` tokens over `num_ranks` ranks. Raises UsageError when they do not divide."""

    num_ranks: int
    seq_len: int
    order: ContextOrder = "zigzag"

    def __post_init__(self) -> None:
        if self.seq_len % self.num_chunks:
            low = self.seq_len // self.num_chunks * self.num_chunks
            fits = " or ".join(str(n) for n in (low, low + self.num_chunks) if n)
            raise UsageError(
                f"rows of {self.seq_len} tokens cannot be split over parallel.context = {self.num_ranks} ranks in "
                f"{self.num_chunks} equal chunks ({self.order}): use a seq_len of {fits}"
            )

    @property
    def num_chunks(self) -> int:
        return self.num_ranks if self.order == "contiguous" or self.num_ranks == 1 else 2 * self.num_ranks

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return self.seq_len // self.num_chunks

    @property
    def local_len(self) -> int:
        """Tokens of a row that a rank holds."""
        return self.seq_len // self.num_ranks

    def chunks(self, rank: int) -> tuple[int, ...]:
        """The chunks of a rank, in the order in which it holds them."""
        return (rank,) if self.num_chunks == self.num_ranks else (rank, self.num_chunks - 1 - rank)

    def positions(self, rank: int) -> np.ndarray:
        """int64 [local_len]: position in the row of each token that the rank holds, rising."""
        return np.concatenate([np.arange(c * self.chunk, (c + 1) * self.chunk) for c in self.chunks(rank)])

    def needed(self, rank: int, window: int) -> np.ndarray:
        """int64, rising: positions whose keys a local layer of `window` keys needs on the rank, its own included."""
        own = self.positions(rank)
        starts = [c * self.chunk for c in self.chunks(rank)]
        before = [np.arange(max(0, start - (window - 1)), start) for start in starts]
        return np.unique(np.concatenate([own, *before]))

    def take(self, rows: Rows, rank: int) -> Rows:
        """The rank's part of whole rows. Rank 0 alone keeps the list of documents, so that no event names one twice."""
        here = self.positions(rank)
        return Rows(
            *(x[:, here] for x in (rows.tokens_BT, rows.targets_BT, rows.segments_BT, rows.positions_BT)),
            documents=rows.documents if rank == 0 else [[] for _ in rows.documents],
        )


@dataclass(frozen=True)
class Halo:
    """The exchange of one rank for windows: what it sends to every rank, and where what it receives belongs.

    Of the keys of `RowSplit.needed`, in that order, `own` are the places of its own tokens and `received` those of the
    tokens that arrive, rank after rank.
    """

    send: tuple[np.ndarray, ...]
    """For each rank: indices into the tokens of this rank, int64."""
    receive_counts: tuple[int, ...]
    own: np.ndarray
    received: np.ndarray


@functools.cache
def halo(split: RowSplit, rank: int, window: int) -> Halo:
    """The exchange of `rank` for a window of `window` keys, the token itself included."""
    mine, needed = split.positions(rank), split.needed(rank, window)
    send = []
    for other in range(split.num_ranks):
        asked = np.setdiff1d(split.needed(other, window), split.positions(other), assume_unique=True)
        send.append(np.flatnonzero(np.isin(mine, asked)) if other != rank else np.zeros(0, np.int64))
    arriving = [
        np.intersect1d(needed, split.positions(other), assume_unique=True) if other != rank else np.zeros(0, np.int64)
        for other in range(split.num_ranks)
    ]
    return Halo(
        tuple(send),
        tuple(len(part) for part in arriving),
        np.searchsorted(needed, mine),
        np.searchsorted(needed, np.concatenate(arriving)),
    )
