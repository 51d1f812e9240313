"""What makes a single document useless, and the hash by which documents are compared and held out."""

import hashlib
import re
import zlib

HASH_BYTES = 16
PIECE_CHARS = 1 << 20
"""Long texts are hashed and tokenized in pieces of about this many characters."""

REASONS = (
    "empty",
    "too short",
    "too long",
    "broken characters",
    "control characters",
    "repetition",
    "duplicate",
)
"""Reasons that `judge` gives, and `duplicate`; readers add `not UTF-8`, `not JSON` and `no text`."""

MAX_BROKEN_SHARE = 0.01
MAX_CONTROL_SHARE = 0.01
MIN_COMPRESSED_SHARE = 0.03
"""English prose keeps about 0.4 of its size under zlib, program text 0.25; one line over and over less than 0.01."""
SAMPLE_CHARS = 1 << 16
LEAST_SAMPLE_BYTES = 2048
"""Short texts are never called repetition: a compressed stream's fixed cost says nothing about them."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
_LINE_START = re.compile(r"\n(?=\S)")
_WORD_START = re.compile(r"(?<=\S)(?= )")


def judge(text: str, min_chars: int, max_chars: int | None, quality: bool) -> str | None:
    """The reason to drop a text, or None. `quality` turns the last three rules on; they see the first SAMPLE_CHARS."""
    if not text or text.isspace():
        return "empty"
    if len(text) < min_chars:
        return "too short"
    if max_chars is not None and len(text) > max_chars:
        return "too long"
    if not quality:
        return None
    sample = text[:SAMPLE_CHARS]
    if sample.count("\ufffd") > MAX_BROKEN_SHARE * len(sample):
        return "broken characters"
    if len(_CONTROL.findall(sample)) > MAX_CONTROL_SHARE * len(sample):
        return "control characters"
    data = sample.encode()
    if len(data) >= LEAST_SAMPLE_BYTES and len(zlib.compress(data, 1)) < MIN_COMPRESSED_SHARE * len(data):
        return "repetition"
    return None


def hash_text(text: str) -> tuple[bytes, int]:
    """(blake2b of the UTF-8 bytes in 16 bytes, number of these bytes), without a second copy of a long text."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    size = 0
    for start in range(0, len(text), PIECE_CHARS):
        data = text[start : start + PIECE_CHARS].encode()
        digest.update(data)
        size += len(data)
    return digest.digest(), size


def is_held_out(content_hash: bytes, fraction: float) -> bool:
    """Whether a document belongs to the validation split: a matter of its content alone."""
    return int.from_bytes(content_hash[8:], "big") < fraction * 2**64


def cuts(text: str, limit: int = PIECE_CHARS) -> list[int]:
    """Ends of pieces of a long text, where tokenizers' patterns cut as well: the pieces have the tokens of the whole.

    Tokenizers keep tens of bytes for each token while they work; a text of a gigabyte in one call would need tens of
    gigabytes. The cut falls after a line break before a non-space, else before a space inside the line, else (one
    endless word) at the limit, where it may cost a token. It depends on the text alone.
    """
    ends = []
    start = 0
    while len(text) - start > limit:
        stop = start + limit
        least = start + limit // 2
        start = _last(_LINE_START, text, least, stop) or _last(_WORD_START, text, least, stop) or stop
        ends.append(start)
    return [*ends, len(text)]


def _last(pattern: re.Pattern[str], text: str, start: int, stop: int) -> int | None:
    """End of the last match inside text[start:stop], searched in growing windows from the end."""
    window = 1024
    while True:
        begin = max(start, stop - window)
        # Two characters more, for the look-ahead.
        ends = [match.end() for match in pattern.finditer(text, begin, stop + 2) if match.end() <= stop]
        if ends:
            return ends[-1]
        if begin == start:
            return None
        window *= 8
