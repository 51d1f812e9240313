"""Integers as answers."""

import re

_INTEGER = re.compile(r"[+-]?[0-9]{1,100}")


def read_integer(completion: str) -> int | None:
    """The integer that the completion consists of, white space around it and one final period aside; None for any other
    text.

    The minus sign U+2212 counts as "-".
    """
    text = completion.strip().removesuffix(".").rstrip().replace("\N{MINUS SIGN}", "-")
    return int(text) if _INTEGER.fullmatch(text) else None


def exact_integer(completion: str, answer: int, *, finished: bool, format_reward: float = 0.1) -> float:
    """1.0 for exactly the right integer, `format_reward` for a wrong integer, 0.0 for anything else.

    `finished`: whether the sampler ended the turn by itself. A completion that was cut off earns nothing, or else a
    policy that rambles after the right number would be paid for it.
    """
    number = read_integer(completion)
    if number is None or not finished:
        return 0.0
    return 1.0 if number == answer else format_reward
