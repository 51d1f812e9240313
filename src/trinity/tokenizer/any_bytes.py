"""Ids of byte strings that are not UTF-8 all through, in linear time however often text and other bytes alternate.

Every call into the library costs as much as some ten tokens, and a megabyte of random bytes has a quarter of a million
stretches of valid text. Here equal stretches are encoded once, and short ones many at a time: joined by a character
that none of them holds, with a first cut around that character. Later cuts see each stretch as a text of its own.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers

from trinity.tokenizer.pretokenize import trinity_pre_tokenizer

EncodeBatch = Callable[[Sequence[str]], list[np.ndarray]]
"""Ids of each text, uint32 [n]."""

_ESCAPED = re.compile("([\udc80-\udcff]+)")
_SHORT = 64
"""Characters of a stretch that is joined with others."""
_TOGETHER = 4096
"""Stretches joined to one text at most."""


def encode_any_bytes(
    data: bytes, byte_ids: Sequence[int], encode_batch: EncodeBatch, model: tokenizers.models.Model | None
) -> np.ndarray:
    """Ids uint32 [n] of valid UTF-8 as text and of every other byte b as `byte_ids[b]`.

    With `model`, a byte-level BPE that goes with `trinity_pre_tokenizer`, short stretches are encoded together.
    """
    # surrogateescape turns an invalid byte b into U+DC00 + b; valid UTF-8 never holds such a character.
    parts = _ESCAPED.split(data.decode("utf-8", "surrogateescape"))  # text, bytes, text, ..., text
    if len(parts) == 1:
        return encode_batch(parts)[0]
    texts, others = parts[::2], parts[1::2]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    ids, sizes = _encode_stretches(list(numbers), byte_ids, encode_batch, model)
    order = np.array([numbers[text] for text in texts])
    lengths = np.zeros(len(parts), np.int64)
    lengths[::2] = sizes[order]
    lengths[1::2] = [len(run) for run in others]
    is_text = np.repeat(np.arange(len(parts)) % 2 == 0, lengths)
    out = np.empty(is_text.size, np.uint32)
    out[is_text] = _gather(ids, sizes, order)
    escaped = np.frombuffer("".join(others).encode("utf-16-le", "surrogatepass"), "<u2")
    out[~is_text] = np.array(byte_ids)[escaped - 0xDC00]
    return out


def _encode_stretches(
    texts: list[str], byte_ids: Sequence[int], encode_batch: EncodeBatch, model: tokenizers.models.Model | None
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all texts one after the other, uint32, and their numbers, int64 [texts]."""
    everything = "".join(texts)
    border = min(map(chr, range(128)), key=everything.count)
    joined = [n for n, text in enumerate(texts) if model and len(text) <= _SHORT and border not in text]
    apart = sorted({*range(len(texts))} - {*joined})
    encoded = encode_batch([texts[n] for n in apart])
    sizes = np.zeros(len(texts), np.int64)
    sizes[apart] = [ids.size for ids in encoded]
    rows: list[np.ndarray] = []
    if model:
        backend = tokenizers.Tokenizer(model)
        # Alone in its piece, the border is the token of its byte, which no piece without that byte can hold.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(border, "isolated"), trinity_pre_tokenizer()]
        )
        groups = [[texts[n] for n in joined[start : start + _TOGETHER]] for start in range(0, len(joined), _TOGETHER)]
        whole = [border.join(group) + border for group in groups]
        rows = [np.array(one.ids, np.uint32) for one in backend.encode_batch_fast(whole, add_special_tokens=False)]
    flat = np.concatenate([*rows, np.empty(0, np.uint32)])
    is_border = flat == byte_ids[ord(border)]
    ends = np.flatnonzero(is_border) - np.arange(len(joined))
    sizes[joined] = np.diff(ends, prepend=0)
    ids = np.concatenate([flat[~is_border], *encoded])
    # `ids` holds the joined stretches first: bring all into the order of `texts`.
    stored = np.array([*joined, *apart])
    return _gather(ids, sizes[stored], np.argsort(stored)), sizes


def _gather(ids: np.ndarray, sizes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Of rows that lie one after the other in `ids`, those numbered `order`, one after the other."""
    starts, taken = np.cumsum(sizes) - sizes, sizes[order]
    shift = starts[order] - (np.cumsum(taken) - taken)
    return ids[np.repeat(shift, taken) + np.arange(taken.sum())]
