"""Rows of T tokens, what fills them, and their way to a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

IGNORE = -100
"""Target of a position without loss."""
PAD_TOKEN = 0
"""Token of padding; any would do, since padding has no loss and is a segment that no token belongs to."""


class DocumentStore(Protocol):
    """What packing needs of tokenised documents; `data/shards.py` is the one on disk."""

    @property
    def num_documents(self) -> int: ...
    @property
    def lengths(self) -> np.ndarray: ...  # [num_documents] tokens, the end-of-text token included
    @property
    def domain_ids(self) -> np.ndarray: ...  # [num_documents] index into `domains`
    @property
    def domains(self) -> Sequence[str]: ...
    @property
    def source_ids(self) -> np.ndarray: ...  # [num_documents] index into `sources`
    @property
    def sources(self) -> Sequence[str]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def tokenizer_fingerprint(self) -> str: ...
    def tokens(self, doc: int, start: int, stop: int) -> np.ndarray: ...
    def describe(self, doc: int) -> dict[str, Any]: ...


class Chunk(NamedTuple):
    """`length` tokens of document `doc` from token `start` on; the segments of a row are its chunks in order."""

    doc: int
    start: int
    length: int


class Packer(Protocol):
    """Fills the rows of one stream."""

    def fill(self, tokens_T: np.ndarray, targets_T: np.ndarray) -> list[Chunk]:
        """Write one row from the left and say what is in it; positions after the last chunk are left alone.

        An empty list means that no document is left.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Rows:
    """A batch of B rows of T tokens.

    `tokens_BT` and `targets_BT` are int64, `segments_BT` and `positions_BT` int32. A target is the token that follows
    in the document, -100 where there is none. Segments number the chunks of a row from 0; -1 is padding. Positions
    restart at 0 with each segment. `documents[b]` lists the chunks of row b.
    """

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    segments_BT: np.ndarray
    positions_BT: np.ndarray
    documents: list[list[Chunk]]

    def __len__(self) -> int:
        return len(self.documents)

    def split(self, micro_rows: int) -> list["Rows"]:
        """Micro-batches of `micro_rows` rows (the last may have fewer), as views."""
        assert micro_rows >= 1
        return [self[start : start + micro_rows] for start in range(0, len(self), micro_rows)]

    def __getitem__(self, rows: slice) -> "Rows":
        return Rows(
            self.tokens_BT[rows],
            self.targets_BT[rows],
            self.segments_BT[rows],
            self.positions_BT[rows],
            self.documents[rows],
        )


class TensorRows(NamedTuple):
    """The arrays of `Rows` as tensors of the same shapes and types."""

    tokens_BT: "torch.Tensor"
    targets_BT: "torch.Tensor"
    segments_BT: "torch.Tensor"
    positions_BT: "torch.Tensor"


def empty_rows(num_rows: int, seq_len: int) -> Rows:
    """Rows of undefined content: write tokens and targets, then `finish_row` each of them."""
    shape = (num_rows, seq_len)
    return Rows(
        tokens_BT=np.empty(shape, np.int64),
        targets_BT=np.empty(shape, np.int64),
        segments_BT=np.empty(shape, np.int32),
        positions_BT=np.empty(shape, np.int32),
        documents=[[] for _ in range(num_rows)],
    )


def finish_row(rows: Rows, row: int, chunks: list[Chunk]) -> None:
    """Write segments, positions and documents of a row whose tokens and targets hold `chunks`, and pad what is left."""
    at = 0
    segments_T, positions_T = rows.segments_BT[row], rows.positions_BT[row]
    counting_T = np.arange(len(segments_T), dtype=np.int32)
    for number, (_, _, length) in enumerate(chunks):
        segments_T[at : at + length] = number
        positions_T[at : at + length] = counting_T[:length]
        at += length
    rows.tokens_BT[row, at:] = PAD_TOKEN
    rows.targets_BT[row, at:] = IGNORE
    segments_T[at:] = -1
    positions_T[at:] = 0
    rows.documents[row] = chunks


def without_borders(rows: Rows) -> None:
    """Make each row one segment, in place: tokens then attend across documents, and positions run on."""
    real_BT = rows.segments_BT >= 0
    rows.segments_BT[real_BT] = 0
    rows.positions_BT[:] = np.where(real_BT, np.arange(rows.tokens_BT.shape[1], dtype=np.int32), 0)


def copy_chunk(
    store: DocumentStore, chunk: Chunk, is_end: bool, at: int, tokens_T: np.ndarray, targets_T: np.ndarray
) -> None:
    """Copy a chunk to position `at` of a row.

    The target of its last token is the document's next token, wherever that one will be an input; the document's last
    token has none.
    """
    doc, start, length = chunk
    stop = at + length
    if is_end:
        words = store.tokens(doc, start, start + length)
        tokens_T[at:stop] = words
        targets_T[at : stop - 1] = words[1:]
        targets_T[stop - 1] = IGNORE
    else:
        words = store.tokens(doc, start, start + length + 1)
        tokens_T[at:stop] = words[:-1]
        targets_T[at:stop] = words[1:]


def to_device(rows: Rows, device: "torch.device | str") -> TensorRows:
    """The arrays as tensors on `device`; to a GPU through pinned memory, without waiting for the copy."""
    import torch

    device = torch.device(device)

    def move(array: np.ndarray) -> "torch.Tensor":
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    return TensorRows(move(rows.tokens_BT), move(rows.targets_BT), move(rows.segments_BT), move(rows.positions_BT))
