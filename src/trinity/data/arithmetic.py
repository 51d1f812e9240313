"""Generated arithmetic with exact answers, and a split by problem that keeps evaluation apart from training.

A problem is an operation and two operands. Whether it is held out depends on these alone (`3 + 4` and `4 + 3` are one
problem), so that no wording of a held-out problem is ever trained on, whichever stage generates it.
"""

import hashlib
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

HELD_OUT_SHARE = 0.1
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}

ASKS = {
    "+": ("What is {a} + {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?"),
    "-": ("What is {a} - {b}?", "Subtract {b} from {a}.", "What is left of {a} after taking away {b}?"),
    "*": ("What is {a} * {b}?", "Multiply {a} by {b}.", "What is the product of {a} and {b}?"),
}
STORIES = {
    "+": "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
    "-": "{name} has {a} {things} and gives {b} away. How many {things} does {name} have left?",
    "*": "{name} fills {a} boxes with {b} {things} each. How many {things} are in the boxes?",
}
NAMES = ("Ada", "Ben", "Chen", "Dina", "Emil", "Fatma", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena")
THINGS = ("apples", "books", "coins", "marbles", "nails", "pencils", "seeds", "shells", "stamps", "tickets")


class Problem(NamedTuple):
    """`a` operation `b`."""

    operation: str
    a: int
    b: int

    @property
    def answer(self) -> int:
        return OPERATIONS[self.operation](self.a, self.b)

    @property
    def question(self) -> str:
        return f"{self.a} {self.operation} {self.b} = "

    @property
    def held_out(self) -> bool:
        """Whether only evaluation may see this problem, in whatever words."""
        a, b = (self.a, self.b) if self.operation == "-" else sorted((self.a, self.b))
        digest = hashlib.blake2b(f"{self.operation} {a} {b}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def draw(rng: Random, max_number: int, held_out: bool = False, operations: str = "+-*") -> Problem:
    """A problem of one side, training or held out; operands are from 0 to `max_number`, no answer is negative."""
    assert max_number >= 9, "smaller ranges may hold no held-out problem"
    while True:
        operation, a, b = rng.choice(operations), rng.randint(0, max_number), rng.randint(0, max_number)
        found = Problem(operation, max(a, b), min(a, b)) if operation == "-" else Problem(operation, a, b)
        if found.held_out == held_out:
            return found


def problem(rng: Random, max_number: int, held_out: bool = False) -> tuple[str, str]:
    """(question, answer) as plain text, such as (`7 + 5 = `, `12`)."""
    found = draw(rng, max_number, held_out)
    return found.question, str(found.answer)


def in_words(rng: Random, found: Problem) -> str:
    """The problem as an English question, bare or as a small story."""
    if rng.random() < 0.5:
        return rng.choice(ASKS[found.operation]).format(a=found.a, b=found.b)
    story = STORIES[found.operation]
    return story.format(name=rng.choice(NAMES), things=rng.choice(THINGS), a=found.a, b=found.b)


def conversation(rng: Random, max_number: int, held_out: bool = False) -> dict[str, Any]:
    """One exchange for SFT: {"messages": [user, assistant]}; the question in symbols or words, the answer a number."""
    found = draw(rng, max_number, held_out)
    question = found.question if rng.random() < 0.5 else in_words(rng, found)
    return {
        "messages": [
            {"role": "user", "content": question.strip()},
            {"role": "assistant", "content": str(found.answer)},
        ]
    }


def column(found: Problem) -> str:
    """The problem written with its digits aligned by place value, as on paper."""
    width = max(len(str(found.a)), len(str(found.b)) + 2, len(str(found.answer)))
    lower = f"{found.operation} {found.b:>{width - 2}}"
    return f"{found.a:>{width}}\n{lower}\n{'-' * width}\n{found.answer:>{width}}"


def text(rng: Random, lines: int, max_number: int) -> str:
    """A document of about `lines` problems from the training side, with their answers: equations, columns, words."""
    kind = rng.choice(("equations", "columns", "words", "mixed"))
    parts = []
    for _ in range(lines):
        found = draw(rng, max_number)
        form = rng.choice(("equations", "columns", "words")) if kind == "mixed" else kind
        if form == "equations":
            parts.append(f"{found.question}{found.answer}")
        elif form == "columns":
            parts.append(f"{column(found)}\n")
        else:
            parts.append(f"{in_words(rng, found)} {found.answer}")
    return "\n".join(parts) + "\n"
