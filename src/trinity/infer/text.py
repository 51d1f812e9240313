"""Text from tokens as they come: whole characters only, and nothing that may turn out to be a stop string."""

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """Turns tokens into pieces of text whose concatenation is the decoded answer, cut before the first stop string.

    A token may end inside a character of several bytes, which then waits for the next token; text that begins a stop
    string waits until it is clear whether the string comes.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._pending: list[int] = []  # tokens since the last border between characters
        self._taken = 0  # characters of their text that were taken already
        self._held = ""  # text that may begin a stop string
        self.text = ""
        """Everything given out so far."""
        self.stopped = False
        """Whether a stop string came."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain, maybe none."""
        self._pending.append(token)
        text = self._decoder.decode(self._pending)
        if text.endswith(REPLACEMENT):
            # A lone replacement sign at the end is a character still in the making (or a real one: `finish` tells).
            new = text[self._taken : -1]
            self._taken = max(self._taken, len(text) - 1)
        else:
            new = text[self._taken :]
            self._pending, self._taken = [], 0
        return self._give(new)

    def finish(self) -> str:
        """The rest of the text, once no more tokens come."""
        rest = self._decoder.decode(self._pending)[self._taken :] if self._pending else ""
        self._pending, self._taken = [], 0
        return self._give(rest, last=True)

    def _give(self, new: str, *, last: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            text = text[: min(found)]
        else:
            keep = 0 if last else self._possible_stop(text)
            self._held = text[len(text) - keep :]
            text = text[: len(text) - keep]
        self.text += text
        return text

    def _possible_stop(self, text: str) -> int:
        """Characters at the end of `text` that begin a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
