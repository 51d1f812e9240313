"""Text from tokens as they come: whole characters only, and nothing that may turn out to be a stop string."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol


class Decoder(Protocol):
    """The part of a tokenizer that generation needs."""

    vocab_size: int

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes: ...


class TextStream:
    """Turns tokens into pieces of text whose concatenation is the decoded answer, cut before the first stop string.

    A token may end inside a character of several bytes, which then waits for the next token; text that may be the
    beginning of a stop string waits until it is clear. Control tokens such as <|im_end|> give no text.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.text = ""
        """Everything given out so far."""
        self.stopped = False
        """Whether a stop string came."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain, maybe none."""
        return self._give(self._characters.decode(self._decoder.decode_bytes([token], skip_special=True)))

    def finish(self) -> str:
        """The rest of the text, once no more tokens come."""
        return self._give(self._characters.decode(b"", final=True), last=True)

    def _give(self, new: str, *, last: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        # The stop string that is complete first ends the text; of two that end together, the longer one.
        found = [(place + len(stop), place) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            end = min(found)[1]
        else:
            end = len(text) if last else len(text) - self._possible_stop(text)
        self._held = "" if found else text[end:]
        self.text += text[:end]
        return text[:end]

    def _possible_stop(self, text: str) -> int:
        """Characters at the end of `text` that begin a stop string."""
        lengths = [length for stop in self._stop for length in range(1, len(stop)) if text.endswith(stop[:length])]
        return max(lengths, default=0)
