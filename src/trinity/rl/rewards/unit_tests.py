"""Code as an answer: run in the sandbox, judged by tests inside or by results that are compared outside.

Tests inside are what most data sets have, and a program that takes its interpreter apart could make them look passed.
Results compared outside cannot be forged: the sandbox is told the calls and never what they should give.
"""

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from trinity.rl.rewards.attempt import Attempt
from trinity.rl.rewards.form import code_block
from trinity.rl.sandbox.pool import Sandbox

_HARNESS = """

def _results(calls):
    import json, sys
    found = []
    for call in calls:
        try:
            found.append(repr(eval(call, dict(globals()))))
        except Exception as error:
            found.append(None)
    return json.dumps(found)
"""


@dataclass(frozen=True)
class Call:
    """An expression, and the literal that it should be."""

    expression: str
    expected: str


def program_of(text: str) -> str | None:
    """The program in an answer: its last block of code, or the whole text where that is Python; else None."""
    block = code_block(text)
    if block is not None:
        return block
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return text if text.strip() else None


class TestsPass:
    """1 when the attempt's program with `info["tests"]`, statements such as asserts, runs to the end."""

    __test__ = False  # for pytest: not a test

    def __init__(self, sandbox: Sandbox, seconds: float = 5.0) -> None:
        self._sandbox, self._seconds = sandbox, seconds

    def __call__(self, attempt: Attempt) -> float:
        program = program_of(attempt.text)
        if program is None:
            return 0.0
        return float(self._sandbox.passes(f"{program}\n\n{attempt.info['tests']}\n", seconds=self._seconds))


class CallsRight:
    """The share of `info["calls"]`, pairs of expression and expected literal, that the attempt's program gets right.

    all_or_nothing: 1 or 0, so that a program for the easy cases earns nothing.
    """

    def __init__(self, sandbox: Sandbox, seconds: float = 5.0, *, all_or_nothing: bool = True) -> None:
        self._sandbox, self._seconds, self._whole = sandbox, seconds, all_or_nothing

    def __call__(self, attempt: Attempt) -> float:
        program = program_of(attempt.text)
        if program is None:
            return 0.0
        calls = [Call(*pair) for pair in attempt.info["calls"]]
        right = self.right(program, calls)
        share = sum(right) / len(right)
        return float(share == 1.0) if self._whole else share

    def right(self, program: str, calls: Sequence[Call]) -> list[bool]:
        mark = uuid4().hex
        asked = json.dumps([call.expression for call in calls])
        ending = f"{_HARNESS}\nimport json as _json\nprint('\\n{mark}' + _results(_json.loads({asked!r})))\n"
        outcome = self._sandbox.run(program + ending, seconds=self._seconds)
        lines = [line for line in outcome.stdout.decode("utf-8", "replace").split("\n") if line.startswith(mark)]
        try:
            found = json.loads(lines[-1].removeprefix(mark)) if lines else []
        except ValueError:
            found = []
        if not isinstance(found, list) or len(found) != len(calls):
            return [False] * len(calls)
        return [same(call.expected, result) for call, result in zip(calls, found, strict=True)]


def same(expected: str, found: Any) -> bool:
    """Whether a result's text is the expected literal: same types, floats to 1e-6."""
    if not isinstance(found, str):
        return False
    try:
        return _alike(ast.literal_eval(expected), ast.literal_eval(found))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return False


def _alike(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b or abs(a - b) <= 1e-6 * max(1.0, abs(a), abs(b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    return a == b
