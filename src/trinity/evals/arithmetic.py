"""Exact-match accuracy on generated arithmetic, of problems that no stage trains on or of those that it does."""

from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from trinity.base.rng import derive
from trinity.data.arithmetic import conversation, draw
from trinity.evals.generation import Complete
from trinity.tokenizer import Tokenizer

Form = Literal["equation", "chat"]
"""`3 + 4 = ` to be continued, or a question in a user's turn."""
MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Question:
    prompt: list[int]
    answer: int


def chat_question(tokenizer: Tokenizer, rng: Random, max_number: int, *, held_out: bool) -> Question:
    """A user's turn, ready for the assistant to answer."""
    user, assistant = conversation(rng, max_number, held_out)["messages"]
    return Question(tokenizer.encode_chat([user], add_generation_prompt=True)[0], int(assistant["content"]))


def questions(
    tokenizer: Tokenizer, count: int, max_number: int, *, form: Form, held_out: bool = True, seed: int = 0
) -> list[Question]:
    """`count` questions, the same ones for the same arguments."""
    rng = Random(derive(seed, "arithmetic", form, int(held_out)))
    if form == "chat":
        return [chat_question(tokenizer, rng, max_number, held_out=held_out) for _ in range(count)]
    problems = [draw(rng, max_number, held_out) for _ in range(count)]
    return [Question(tokenizer.encode(found.question), found.answer) for found in problems]


def evaluate(complete: Complete, asked: list[Question]) -> dict[str, Any]:
    """`{value, standard_error, samples}`: the share answered exactly.

    Right is a first line that is the number and nothing else (one final period aside): a base model goes on after it
    with the next problem.
    """
    texts = complete([question.prompt for question in asked], MAX_NEW_TOKENS)
    lines = [text.strip().partition("\n")[0].rstrip().removesuffix(".") for text in texts]
    right = sum(line == str(question.answer) for line, question in zip(lines, asked, strict=True))
    value = right / len(asked)
    return {"value": value, "standard_error": (value * (1 - value) / len(asked)) ** 0.5, "samples": len(asked)}
