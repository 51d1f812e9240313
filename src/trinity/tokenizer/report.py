"""How good a tokenizer is: bytes per token, digit alignment, and the same against two well-known pretokenisations."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from trinity.tokenizer.pretokenize import DEEPSEEK_MAIN, trinity_split
from trinity.tokenizer.tokenizer import Tokenizer
from trinity.tokenizer.train import train_bpe


@dataclass(frozen=True)
class Compression:
    """Size of one group of texts in bytes, tokens and documents."""

    bytes: int
    tokens: int
    documents: int

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens if self.tokens else 0.0


def compression(
    tokenizer: Tokenizer | tokenizers.Tokenizer, groups: Mapping[str, Sequence[str]]
) -> dict[str, Compression]:
    """Bytes per token of each group of texts, such as a domain or a language, and of "all" together."""
    rows = {name: _measure(tokenizer, texts) for name, texts in groups.items()}
    parts = list(rows.values())
    rows["all"] = Compression(
        sum(part.bytes for part in parts), sum(part.tokens for part in parts), sum(part.documents for part in parts)
    )
    return rows


def _measure(tokenizer: Tokenizer | tokenizers.Tokenizer, texts: Sequence[str]) -> Compression:
    if isinstance(tokenizer, Tokenizer):
        tokens = sum(ids.size for ids in tokenizer.encode_batch(texts))
    else:
        tokens = sum(len(encoding) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    return Compression(sum(len(text.encode()) for text in texts), tokens, len(texts))


def digit_alignment(split: PreTokenizer, lengths: Iterable[int] = range(4, 41)) -> float:
    """Share of the cuts in whole numbers that fall between groups of three counted from the right; 1 is aligned.

    Each length is tried alone, after a word, a sign and a point.
    """
    right = total = 0
    for length in lengths:
        digits = ("1234567890" * (length // 10 + 1))[:length]
        for before in ("", "x", "-", "."):
            stop = len(before) + length
            for _, (start, _) in split.pre_tokenize_str(before + digits):
                if start > len(before):
                    total += 1
                    right += (stop - start) % 3 == 0
    return right / total if total else 1.0


def rival_splits() -> dict[str, PreTokenizer]:
    """The published cuts of GPT-4's cl100k and of DeepSeek-V3, before the text becomes bytes."""
    cl100k = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    deepseek = (r"\p{N}{1,3}", r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK_MAIN)
    return {
        "cl100k": pre_tokenizers.Split(Regex(cl100k), "isolated"),
        "deepseek-v3": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in deepseek]
        ),
    }


def compare(
    training: Iterable[str], held_out: Mapping[str, Sequence[str]], vocab_size: int
) -> dict[str, dict[str, Compression]]:
    """Compression of held-out groups by Trinity's cuts and the rivals', each trained on the same texts and size.

    `training` must be iterable more than once.
    """
    splits = {"trinity": trinity_split(), **rival_splits()}
    return {name: compression(train_bpe(training, vocab_size, split), held_out) for name, split in splits.items()}


def pieces(text: str, split: PreTokenizer | None = None) -> list[str]:
    """The pieces between which BPE never merges."""
    return [text[start:end] for _, (start, end) in (split or trinity_split()).pre_tokenize_str(text)]


def show_splits(text: str, tokenizer: Tokenizer | None = None) -> str:
    """`text` with a bar between pieces, or, with a tokenizer, between tokens; white space and odd bytes made visible.

    A bar of the text itself is shown as `\\|`, a space as `·`, and part of a character as `<E4>`.
    """
    if tokenizer is None:
        return "|".join(_visible(piece.encode("utf-8", "surrogatepass")) for piece in pieces(text))
    return "|".join(_visible(tokenizer.decode_bytes([i])) for i in tokenizer.encode(text))


_SHOWN = {" ": "·", "\n": "\\n", "\t": "\\t", "\r": "\\r", "|": "\\|", "\\": "\\\\"}


def _visible(data: bytes) -> str:
    shown = ""
    for character in data.decode("utf-8", "surrogateescape"):
        if 0xDC80 <= ord(character) <= 0xDCFF:
            shown += f"<{ord(character) - 0xDC00:02X}>"
        elif character in _SHOWN:
            shown += _SHOWN[character]
        else:
            shown += character if character.isprintable() else f"<U+{ord(character):04X}>"
    return shown
