"""Rewards on the form of an answer: a box around the result, a thought before it, JSON, blocks of code."""

import json
import re

from trinity.rl.rewards.attempt import Attempt, Reward

_NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(?:\.\d+)?")
_CODE = re.compile(r"^[ ]{0,3}```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ ]{0,3}```[ \t]*$", re.DOTALL | re.MULTILINE)


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds, braces balanced; None without a whole one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for at in range(begin, len(text)):
        if text[at] == "{" and text[at - 1] != "\\":
            depth += 1
        elif text[at] == "}" and text[at - 1] != "\\":
            if depth == 0:
                return text[begin:at].strip()
            depth -= 1
    return None


def last_number(text: str) -> str | None:
    """The last number in a text, without thousands separators and currency signs; None without one."""
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return found[-1].replace(",", "").replace("$", "").removeprefix("+") if found else None


def code_block(text: str, language: str = "python") -> str | None:
    """The last fenced block of a language, or without one named; None where there is none that is closed."""
    blocks = [body for name, body in _CODE.findall(text) if name.lower() in ("", language, language[:2])]
    return blocks[-1] if blocks else None


def final_number(attempt: Attempt) -> float:
    """1 when the answer in a box, or else the text's last number, is the number `answer`; exact, as decimals."""
    from decimal import Decimal, InvalidOperation

    given = boxed(attempt.text)
    said = last_number(given if given is not None else attempt.text)
    try:
        wanted = Decimal(attempt.answer.replace(",", "").strip())
        return float(said is not None and Decimal(said) == wanted)
    except InvalidOperation:
        return 0.0


def has_box(attempt: Attempt) -> float:
    """1 for exactly one box with something in it."""
    return float(attempt.text.count("\\boxed{") == 1 and bool(boxed(attempt.text)))


def thinks_first(attempt: Attempt) -> float:
    """1 for a text that is one thought and then an answer, neither of them empty."""
    contents = [m.get("content") or "" for m in attempt.completion if m.get("role") == "assistant"]
    text = contents[-1] if contents else ""
    if text.count("<think>") != 1 or text.count("</think>") != 1 or not text.lstrip().startswith("<think>"):
        return 0.0
    thought, _, answer = text.partition("</think>")
    return float(bool(thought.replace("<think>", "").strip()) and bool(answer.strip()))


def is_json(attempt: Attempt) -> float:
    """1 for a text that is one JSON value, a fence around it aside."""
    text = code_block(attempt.text, "json") or attempt.text
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def length_within(most_words: int) -> Reward:
    """1 up to so many words, then falling in a straight line to 0 at twice as many."""
    assert most_words > 0

    def reward(attempt: Attempt) -> float:
        words = len(attempt.text.split())
        return min(1.0, max(0.0, 2.0 - words / most_words))

    return reward
