"""Training the vocabulary: byte-level BPE over a stream of texts."""

from collections.abc import Callable, Iterable, Iterator

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import PreTokenizer

from trinity.base.errors import UsageError, UserError
from trinity.config import TokenizerConfig
from trinity.tokenizer.pretokenize import byte_level, cut_long, trinity_split
from trinity.tokenizer.template import CONTROL_TOKENS, MARKUP_TOKENS
from trinity.tokenizer.tokenizer import Tokenizer

Progress = Callable[[int], None]
"""Called with the bytes of text read so far."""

MAX_TOKEN_BYTES = 64
"""Longest token that is learned: no run of dashes or boilerplate sentence takes an entry."""
MAX_WORD_CHARACTERS = 256
"""Pieces longer than this are counted in parts, so that one endless word cannot fill memory or stall the merges."""
PART_CHARACTERS = 1 << 20


def train_tokenizer(
    texts: Iterable[str],
    settings: TokenizerConfig,
    progress: Progress | None = None,
    total_bytes: int | None = None,
) -> Tokenizer:
    """Learn `settings.vocab_size` entries, the 256 bytes included, and add the special tokens after them.

    Texts are streamed; memory grows with the number of different words only. When the texts hold more than
    `settings.sample_bytes`, documents are taken evenly from the whole stream. Their size comes from `total_bytes` or,
    when `texts` can be iterated twice, from a first pass. Too little text gives fewer entries. The result depends on
    the texts and settings alone. Raises UserError when there is no text, and when an iterator of unknown size turns
    out to hold more than the sample.
    """
    model = train_bpe(sample(texts, settings.sample_bytes, total_bytes), settings.vocab_size, trinity_split(), progress)
    model.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL_TOKENS])
    model.add_tokens([AddedToken(token, normalized=False, special=False) for token in MARKUP_TOKENS])
    return Tokenizer(model.to_str(pretty=True) + "\n")


def train_bpe(
    texts: Iterable[str], vocab_size: int, split: PreTokenizer, progress: Progress | None = None
) -> tokenizers.Tokenizer:
    """Byte-level BPE with the given cuts and no special tokens."""
    if vocab_size < 256:
        raise UsageError(f"tokenizer.vocab_size = {vocab_size} is smaller than the 256 bytes it must hold")
    model = tokenizers.Tokenizer(models.BPE())
    model.decoder = decoders.ByteLevel()
    shorten = pre_tokenizers.Split(Regex(f"(?m:.{{{MAX_WORD_CHARACTERS}}})"), "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence([split, shorten, byte_level()])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=False,
    )
    model.train_from_iterator(_parts(texts, progress), trainer)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level()])
    return model


def _parts(texts: Iterable[str], progress: Progress | None) -> Iterator[str]:
    read = 0
    blank = True
    for text in texts:
        blank = blank and not text.strip()
        for part in cut_long(text, PART_CHARACTERS, anywhere=True):
            yield part
            read += _num_bytes(part)
        if progress:
            progress(read)
    if blank:
        raise UserError("there is no text to train the tokenizer on")


def sample(texts: Iterable[str], sample_bytes: int, total_bytes: int | None = None) -> Iterator[str]:
    """Whole texts spread evenly over the stream, at most `sample_bytes` of them; the last may be cut.

    A text is taken whenever what was taken has fallen behind its share of what was seen, whatever the text's length.
    """
    if total_bytes is None and iter(texts) is not texts:
        total_bytes = sum(map(_num_bytes, texts))
    seen = taken = 0
    for text in texts:
        size = _num_bytes(text)
        if total_bytes is None and taken + size > sample_bytes:
            raise UserError(
                f"the texts exceed tokenizer.sample_bytes = {sample_bytes}, and their total size is not known: raise "
                "it, or give total_bytes, so that the sample can be taken evenly"
            )
        if total_bytes is None or taken * total_bytes <= sample_bytes * seen:
            room = sample_bytes - taken
            yield text if size <= room else text.encode("utf-8", "surrogatepass")[:room].decode("utf-8", "ignore")
            taken += min(size, room)
        if taken >= sample_bytes and total_bytes is not None:
            return
        seen += size


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
