"""Small functions to write, generated with seeds; the reward compares what they give with what they should give.

A family is a source text with places for constants, words that ask for it, and a way to draw arguments. The calls are
run in the sandbox, the expected results never enter it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from trinity.base.rng import derive
from trinity.rl.environments.environment import Row
from trinity.rl.environments.questions import SingleTurn
from trinity.rl.rewards.attempt import Attempt, Rubric
from trinity.rl.rewards.unit_tests import CallsRight, program_of
from trinity.rl.sandbox.pool import Sandbox

_SHOWN, _HIDDEN = 2, 10


@dataclass(frozen=True)
class Family:
    name: str
    asks: str
    """What the function does; {c} is its constant."""
    source: str
    """The body of `def NAME(...)`, with NAME and C."""
    constants: tuple[int | str, ...]
    arguments: Callable[[Random], tuple[Any, ...]]


def _numbers(rng: Random, low: int = -20, high: int = 20, shortest: int = 0) -> list[int]:
    return [rng.randint(low, high) for _ in range(rng.randint(shortest, 8))]


def _word(rng: Random) -> str:
    return "".join(rng.choice("abcdeiouxyzAE") for _ in range(rng.randint(1, 8)))


def _text(rng: Random) -> str:
    return " ".join(_word(rng) for _ in range(rng.randint(0, 5)))


FAMILIES = (
    Family(
        "sum_of_multiples",
        "takes a list of integers and returns the sum of those that are divisible by {c}",
        "def NAME(values):\n    return sum(v for v in values if v % C == 0)",
        (2, 3, 4, 5, 7),
        lambda rng: (_numbers(rng),),
    ),
    Family(
        "count_above",
        "takes a list of integers and returns how many of them are greater than {c}",
        "def NAME(values):\n    return sum(1 for v in values if v > C)",
        (-3, 0, 4, 9),
        lambda rng: (_numbers(rng),),
    ),
    Family(
        "rotate",
        "takes a list and returns a new list with its items moved {c} places to the left, those that fall off coming "
        "back at the end; an empty list stays empty",
        "def NAME(values):\n    k = C % len(values) if values else 0\n    return values[k:] + values[:k]",
        (1, 2, 3, 5),
        lambda rng: (_numbers(rng),),
    ),
    Family(
        "chunks",
        "takes a list and returns it cut into lists of {c} items, the last one perhaps shorter",
        "def NAME(values):\n    return [values[i : i + C] for i in range(0, len(values), C)]",
        (2, 3, 4),
        lambda rng: (_numbers(rng),),
    ),
    Family(
        "shift_letters",
        "takes a string and replaces each lower-case letter a to z by the one {c} places later in the alphabet, going "
        "on with a after z; all else stays",
        "def NAME(text):\n    return ''.join(chr((ord(c) - 97 + C) % 26 + 97) if 'a' <= c <= 'z' else c for c in text)",
        (1, 3, 5, 13),
        lambda rng: (_text(rng),),
    ),
    Family(
        "long_words",
        "takes a string and returns the list of its words, divided by spaces, that have at least {c} letters, in order",
        "def NAME(text):\n    return [w for w in text.split() if len(w) >= C]",
        (2, 3, 4, 5),
        lambda rng: (_text(rng),),
    ),
    Family(
        "count_letter",
        "takes a string and returns how often the letter {c} stands in it, in either case",
        "def NAME(text):\n    return text.lower().count('C')",
        ("a", "e", "x"),
        lambda rng: (_text(rng),),
    ),
    Family(
        "digits_in_base",
        "takes an integer that is 0 or more and returns the list of its digits in base {c}, the most significant first",
        "def NAME(n):\n    digits = []\n    while n >= C:\n        digits.append(n % C)\n        n //= C\n"
        "    digits.append(n)\n    return digits[::-1]",
        (2, 3, 5, 8),
        lambda rng: (rng.randint(0, 500),),
    ),
    Family(
        "clamp_all",
        "takes a list of integers and returns a list in which each one below -{c} has become -{c} and each one above "
        "{c} has become {c}",
        "def NAME(values):\n    return [max(-C, min(C, v)) for v in values]",
        (3, 5, 10),
        lambda rng: (_numbers(rng),),
    ),
    Family(
        "run_lengths",
        "takes a list and returns a list of pairs (item, how often it stands there in a row), leaving out runs "
        "shorter than {c}",
        "def NAME(values):\n    runs = []\n    for v in values:\n        if runs and runs[-1][0] == v:\n"
        "            runs[-1] = (v, runs[-1][1] + 1)\n        else:\n            runs.append((v, 1))\n"
        "    return [r for r in runs if r[1] >= C]",
        (1, 2, 3),
        lambda rng: ([rng.randint(0, 2) for _ in range(rng.randint(0, 10))],),
    ),
    Family(
        "nth_largest",
        "takes a list of integers and returns the one that comes at place {c} when its different values are sorted "
        "from the largest down (place 1 is the largest), or None when there are fewer",
        "def NAME(values):\n    ordered = sorted(set(values), reverse=True)\n"
        "    return ordered[C - 1] if len(ordered) >= C else None",
        (1, 2, 3),
        lambda rng: (_numbers(rng, 0, 9),),
    ),
    Family(
        "running_best",
        "takes a list of integers and returns for each place the largest of the last {c} values up to and with it",
        "def NAME(values):\n    return [max(values[max(0, i - C + 1) : i + 1]) for i in range(len(values))]",
        (2, 3, 4),
        lambda rng: (_numbers(rng),),
    ),
)


def solution(family: Family, name: str, constant: int | str) -> str:
    return family.source.replace("NAME", name).replace("C", str(constant))


class CodeTasks(SingleTurn):
    """One function a row. Held-out rows have constants of their own: the last of each family."""

    name = "code_tasks"

    def __init__(self, sandbox: Sandbox, seed: int) -> None:
        self._seed = seed
        self.rubric = Rubric({"right": CallsRight(sandbox), "is_code": _is_code}, {"right": 0.95, "is_code": 0.05})

    def row(self, number: int, *, held_out: bool = False) -> Row:
        rng = Random(derive(self._seed, "code task", int(held_out), number))
        family = rng.choice(FAMILIES)
        constant = family.constants[-1] if held_out else rng.choice(family.constants[:-1])
        name = f"{family.name}_{constant}".replace("-", "minus_")
        source = solution(family, name, constant)
        space: dict[str, Any] = {}
        exec(source, space)  # our own text
        calls: list[tuple[str, str]] = []
        while len(calls) < _SHOWN + _HIDDEN:
            arguments = family.arguments(rng)
            expression = f"{name}({', '.join(map(repr, arguments))})"
            if len(calls) < 3 * _HIDDEN and expression in dict(calls) and rng.random() < 0.9:
                continue
            calls.append((expression, repr(space[name](*arguments))))
        examples = "\n".join(f"{expression} == {expected}" for expression, expected in calls[:_SHOWN])
        question = (
            f"Write a Python function `{name}` that {family.asks.format(c=constant)}.\n\n{examples}\n\n"
            "Answer with one block of code."
        )
        info = {"calls": calls, "solution": source, "family": family.name}
        return Row([{"role": "user", "content": question}], info=info)


def _is_code(attempt: Attempt) -> float:
    return float(program_of(attempt.text) is not None)
