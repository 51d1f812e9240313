"""Taking the answer out of a generated text, and comparing it with the right one."""

import re
import string
import unicodedata
from collections.abc import Iterable
from fractions import Fraction

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def plain_words(text: str) -> str:
    """Lower case, without punctuation, articles and repeated blanks, as question answering compares strings."""
    text = unicodedata.normalize("NFKC", text).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def matches_any(text: str, answers: Iterable[str]) -> bool:
    """Whether the first line, up to its first full stop or comma, is one of the answers."""
    first = text.strip().partition("\n")[0]
    return plain_words(first) in {plain_words(answer) for answer in answers if plain_words(answer)}


def contains_any(text: str, answers: Iterable[str]) -> bool:
    """Whether one of the answers stands in the text as whole words."""
    padded = f" {plain_words(text)} "
    return any(f" {words} " in padded for words in map(plain_words, answers) if words)


def chosen_letter(text: str, count: int) -> str | None:
    """The letter that a text settles on: after "answer is" or "answer:", in a box, or alone; the last one counts."""
    letters = f"A-{chr(ord('A') + count - 1)}"
    said = re.findall(rf"answer(?:\s+is)?\s*:?\s*\**\(?([{letters}])\b\)?", text, re.IGNORECASE)
    said = said or re.findall(rf"\\boxed\{{\s*(?:\\text\{{)?\(?([{letters}])\)?", text)
    said = said or re.findall(rf"^\W*([{letters}])\W*$", text.strip(), re.MULTILINE)
    return said[-1].upper() if said else None


def after_phrase(text: str, phrase: str = "the answer is") -> str:
    """What follows the phrase on its line, without the full stop; the whole stripped text where it never comes."""
    place = text.lower().rfind(phrase)
    if place < 0:
        return text.strip()
    return text[place + len(phrase) :].strip().partition("\n")[0].strip().removesuffix(".").strip()


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...}, braces balanced."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len(r"\boxed{")
    for place in range(begin, len(text)):
        if text[place] == "{":
            depth += 1
        elif text[place] == "}":
            if depth == 0:
                return text[begin:place]
            depth -= 1
    return None


def final_answer(text: str) -> str:
    """The answer of a worked solution: in a box, else after "the final answer is", else its last number."""
    found = boxed(text)
    if found is not None:
        return found
    place = text.lower().rfind("final answer is")
    if place >= 0:
        line = text[place + len("final answer is") :].split("I hope it is correct")[0].strip()
        return line.partition("\n")[0].strip().removesuffix(".").strip("$ ")
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return numbers[-1] if numbers else text.strip()


def plain_math(text: str) -> str:
    """An expression in LaTeX without what does not change its value: dollars, spaces, sizes, units, text commands."""
    text = text.strip().strip("$").replace("\\!", "").replace("\\,", "").replace("\\ ", "").replace("\\;", "")
    text = text.replace("\\left", "").replace("\\right", "").replace("dfrac", "frac").replace("tfrac", "frac")
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf)\{\s*([^{}]*?)\s*\}", r"\1", text)
    text = re.sub(r"\^\{?\\circ\}?|\\%|%|\\\$|\$", "", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text)
    text = re.sub(r"\b(?:dollars|cents|units|degrees|inches|feet|cm|meters)\b", "", text)
    if "=" in text and text.count("=") == 1 and len(text.split("=")[0].strip()) <= 2:
        text = text.split("=")[1]
    return re.sub(r"\s+", "", text).removesuffix(".")


def equal_math(one: str, other: str) -> bool:
    """Equal as normalised strings, or as exact numbers (0.5, 1/2 and \\frac{1}{2})."""
    first, second = plain_math(one), plain_math(other)
    if first == second:
        return bool(first)
    numbers = _number(first), _number(second)
    return numbers[0] is not None and numbers[0] == numbers[1]


def _number(text: str) -> Fraction | None:
    text = re.sub(r"^(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}$", r"\1\2/\3", text)
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None
