"""Streaming text: any cutting of any bytes gives the decoded text, and stop strings are found across pieces."""

import itertools
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.infer.text import TextStream


class Pieces:
    """A decoder whose token i stands for the i-th of some byte strings."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.vocab_size = len(pieces)

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        return b"".join(self.pieces[i] for i in ids)


def stream(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    text = TextStream(Pieces(pieces), stop)
    out = []
    for i in range(len(pieces)):
        out.append(text.push(i))
        if text.stopped:
            break
    out.append(text.finish())
    return out, text


def cut(data: bytes, borders: list[int]) -> list[bytes]:
    points = sorted({0, len(data), *(b % (len(data) + 1) for b in borders)})
    return [data[a:b] for a, b in itertools.pairwise(points)]


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.text().map(str.encode), st.binary()), st.lists(st.integers(0, 1000)))
def test_pieces_join_to_the_decoded_text(data: bytes, borders: list[int]) -> None:
    out, text = stream(cut(data, borders))
    assert "".join(out) == data.decode("utf-8", "replace") == text.text


def test_a_character_is_given_whole() -> None:
    out, _ = stream([bytes([b]) for b in "a\u20ac\U0001f600b".encode()])
    assert [piece for piece in out if piece] == ["a", "\u20ac", "\U0001f600", "b"]


@settings(max_examples=40, deadline=None)
@given(
    st.text(alphabet="abx", max_size=30),
    st.lists(st.text(alphabet="abx", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_stop_strings_cut_the_text_however_it_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    borders = data.draw(st.lists(st.integers(0, 100)))
    out, streamed = stream(cut(text.encode(), borders), tuple(stops))
    # The definition: read character by character until a stop string is complete; cut before the longest such.
    expected = text
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            expected = text[: end - len(max(complete, key=len))]
            break
    assert "".join(out) == expected == streamed.text
    assert streamed.stopped == any(stop in text for stop in stops)


def test_text_that_may_begin_a_stop_string_waits() -> None:
    out, _ = stream([b"one", b" <en", b"d> two", b"<end"], ("<end>",))
    assert out[:2] == ["one", " "]
    assert out[2] == "" or out == ["one", " ", ""]
    out, _ = stream([b"a<en", b"x"], ("<end>",))
    assert out == ["a", "<enx", ""]
