"""Cuts: equal to the report's steps, digits from the right, scripts as one class, linear time."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity.tokenizer.pretokenize import (
    SCRIPT_RANGES,
    byte_alphabet,
    cut_long,
    reference_steps,
    trinity_split,
)
from trinity.tokenizer.report import digit_alignment, pieces, rival_splits

SPLIT, REFERENCE = trinity_split(), reference_steps()
# One character or more of every kind that a rule tells apart; escapes where characters look alike.
KINDS = "aZ\u00e9\u0301 \t\n\r\x0b\x85\u00a0\u3000\u2028!_.$+\u20ac1\u0663\u0e53\u00b2\u2167\0\u200b\ufffd\U0001f600"
KINDS += "\u4e2d\u304b\u30fb\uff66\u2f00\u0e40\u0e01\u0e3f\u0ebd\u0eff\u0eb1\u1780\u17f0\u1000\u1031\u1041\uac00\u1100"
kinds = st.text(st.sampled_from(KINDS), max_size=40)
in_scripts = st.one_of(*(st.integers(first, last).map(chr) for first, last in SCRIPT_RANGES))


@given(st.one_of(st.text(), kinds, st.text(st.one_of(in_scripts, st.sampled_from(KINDS)))))
def test_one_pattern_cuts_like_the_steps(text: str):
    assert pieces(text, SPLIT) == pieces(text, REFERENCE)
    assert "".join(pieces(text, SPLIT)) == text


def groups(length: int) -> list[int]:
    return ([length % 3] if length % 3 else []) + [3] * (length // 3)


@pytest.mark.parametrize(
    "before", ["", "a", "-", "+", ".", " ", "\n", "\u4e2d", "\u0e40", "\u0301", "\u20ac", "\0", "\u00b2"]
)
@pytest.mark.parametrize("after", ["", "b", "e5", ".25", "%", " x", "\n", "\u4e2d", "\u0301", ","])
def test_digits_are_grouped_from_the_right(before: str, after: str):
    for length in [*range(1, 41), 1000, 1001, 1002]:
        digits = ("1234567890" * (length // 10 + 1))[:length]
        cut = pieces(before + digits + after)
        lengths = [len(piece) for piece in cut if set(piece) <= set(digits)]
        assert lengths[: len(groups(length))] == groups(length)
        assert "".join(cut) == before + digits + after


def test_digits_of_any_script_are_digits():
    assert pieces("1234567") == ["1", "234", "567"]
    assert pieces("\u0661\u0662\u0663\u0664") == ["\u0661", "\u0662\u0663\u0664"]  # Arabic-Indic
    assert pieces("\u0e51\u0e52\u0e53\u0e54") == ["\u0e51", "\u0e52\u0e53\u0e54"]  # Thai, inside a script range
    assert pieces("x\u00b2") == ["x", "\u00b2"]  # a superscript has no place value


def test_digit_alignment_tells_the_pretokenisations_apart():
    assert digit_alignment(SPLIT) == 1.0
    assert digit_alignment(rival_splits()["cl100k"]) < 0.5


@pytest.mark.parametrize("first_and_last", [r for r in SCRIPT_RANGES if r[0] != 0x2F00])  # radicals are symbols
def test_scripts_are_isolated_as_one_class(first_and_last: tuple[int, int]):
    words = [chr(c) for c in range(first_and_last[0], first_and_last[1] + 1) if chr(c).isalpha()]
    for word in words[:: max(1, len(words) // 50)]:
        assert pieces(f"ab{word}\u4e2d{word}cd") == ["ab", f"{word}\u4e2d{word}", "cd"]


def test_main_pattern():
    assert pieces("Don't stop.\n\n  now") == ["Don", "'t", " stop", ".\n\n", " ", " now"]
    assert pieces("a  \n  \n   b") == ["a", "  \n  \n", "  ", " b"]
    assert pieces("x = f(y)") == ["x", " =", " f", "(y", ")"]


# The bench script measures a million bytes of each; here a quadratic pattern would already need many minutes.
N = 300_000
HOSTILE = {
    "digits": "7" * N,
    "spaces": " " * N,
    "spaces before a word": " " * N + "x",
    "one letter": "a" * N,
    "line breaks": "\n" * N,
    "spaced line breaks": " \n" * (N // 2),
    "line break, then spaces": "\n" + " " * N + "x",
    "combining marks": "\u0301" * (N // 2),
    "mixed scripts": "a1\u4e2d \n!\u00e9" * (N // 10),
    "replaced bytes": "\ufffd" * (N // 3),
    "unassigned": "\u0eff" * (N // 3),
    "nulls": "\0" * N,
    "digits and points": "1." * (N // 2),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_time_is_linear(name: str):
    start = time.perf_counter()
    assert sum(map(len, pieces(HOSTILE[name]))) == len(HOSTILE[name])
    assert time.perf_counter() - start < 15


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "count"), [(" " * 11_000_000 + "x", 2), (" \n" * 5_500_000, 55), ("\n" + " " * 11_000_000, 2)]
)
def test_eleven_million_characters_do_not_abort_the_engine(text: str, count: int):
    assert len(pieces(text)) == count


@given(st.one_of(kinds, st.text(st.sampled_from("ab \n\u0301"), max_size=60)), st.integers(1, 8))
def test_long_texts_are_cut_where_pretokenisation_cuts(text: str, size: int):
    parts = cut_long(text, size)
    assert "".join(parts) == text
    assert [piece for part in parts for piece in pieces(part)] == pieces(text)


@given(st.text(max_size=60), st.integers(1, 8))
def test_cutting_anywhere_bounds_the_parts(text: str, size: int):
    parts = cut_long(text, size, anywhere=True)
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 2 * size


def test_byte_alphabet_has_a_character_for_every_byte():
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(byte_alphabet()) == sorted(ByteLevel.alphabet())
    split = ByteLevel(add_prefix_space=False, use_regex=False)
    for character in ("a", " ", "\n", "\u00e9", "\u4e2d"):
        shown = "".join(byte_alphabet()[byte] for byte in character.encode())
        assert split.pre_tokenize_str(character)[0][0] == shown
