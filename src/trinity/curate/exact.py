"""Exact arithmetic on expressions that a model wrote: fractions, no names, no calls, bounded work."""

import ast
import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

MOST_CHARS = 300
MOST_POWER = 64
MOST_BITS = 4096
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?|[-+]?\.\d+")
_CHAIN = re.compile(r"[-+*/^()\d.,%\s\u00d7\u00f7\u00b7\u2212=]*=[-+*/^()\d.,%\s\u00d7\u00f7\u00b7\u2212=]*\d")
_SIGNS = str.maketrans({"\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-", "^": "\u02c6"})
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_FINAL = (re.compile(r"####\s*(.+)"), re.compile(r"\\boxed\{([^{}]+)\}"))


def value(expression: str) -> Fraction | None:
    """The value of an expression of numbers, + - * / ^ % and parentheses; None when it is none or too large."""
    text = _THOUSANDS.sub("", expression.strip().translate(_SIGNS).replace("\u02c6", "**"))
    text = re.sub(r"(\d)\s*%", r"(\1/100)", text) if "%" in text else text
    text = re.sub(r"\b0+(?=\d)", "", text)
    if not text or len(text) > MOST_CHARS:
        return None
    try:
        return _value(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(ast.get_source_segment(text, node) or "")  # not by way of a float
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return _value(node.operand, text) * (-1 if isinstance(node.op, ast.USub) else 1)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, text), _value(node.right, text)
        if isinstance(node.op, ast.Add):
            result = left + right
        elif isinstance(node.op, ast.Sub):
            result = left - right
        elif isinstance(node.op, ast.Mult):
            result = left * right
        elif isinstance(node.op, ast.Div):
            result = left / right
        elif isinstance(node.op, ast.Pow) and right.denominator == 1 and abs(right) <= MOST_POWER:
            if _bits(left) * max(1, abs(int(right))) > MOST_BITS:
                raise ValueError("too large")
            result = left ** int(right)
        else:
            raise ValueError("not arithmetic")
        if _bits(result) > MOST_BITS:
            raise ValueError("too large")
        return result
    raise ValueError("not arithmetic")


def _bits(number: Fraction) -> int:
    return number.numerator.bit_length() + number.denominator.bit_length()


def number_in(text: str) -> Fraction | None:
    """The last number of a short answer such as `$1,250.50` or `3/4`; None when there is none."""
    found = _NUMBER.findall(text.translate(_SIGNS))
    return value(found[-1].replace(" ", "").replace(",", "")) if found else None


def final_answer(text: str) -> Fraction | None:
    r"""The result that a worked solution gives after #### or in \boxed{}; None without one."""
    for pattern in _FINAL:
        found = pattern.findall(text)
        if found:
            return number_in(found[-1])
    return None


def wrong_equations(text: str) -> Iterator[str]:
    """Equations between numbers that do not hold; a result with d decimals may be rounded to them."""
    for match in _CHAIN.finditer(text):
        chain = match.group()
        before = text[: match.start()].rstrip()[-1:]
        sides = chain.split("=")
        for place, (left, right) in enumerate(pairwise(sides)):
            left, right = left.strip(" ,.\n\t"), right.strip(" ,.\n\t").split("\n")[0]
            left = left.split("\n")[-1]
            if place == 0 and (before.isalnum() or before in (")", "]", "}", "_", "$", "\\")):
                continue  # part of a larger expression with letters
            if place == 0 and left[:1] in "*/^\u00d7\u00f7\u00b7":
                continue
            one, other = value(left), value(right)
            if one is None or other is None or not (_is_sum(left) or _is_sum(right)):
                continue
            decimals = re.search(r"\.(\d+)$", right)
            slack = Fraction(1, 2 * 10 ** len(decimals.group(1))) if decimals else Fraction(0)
            if abs(one - other) > slack:
                yield f"{left} = {right}"


def _is_sum(text: str) -> bool:
    """Whether anything is calculated in it."""
    return bool(re.search(r"[\d)%]\s*[-+*/^\u00d7\u00f7\u00b7\u2212]\s*[\d(.-]", text))
