"""Environments of one question and one answer: arithmetic, word problems from a file, checkable instructions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from trinity.base.errors import UserError
from trinity.base.rng import derive
from trinity.data import arithmetic
from trinity.data.json_lines import read_objects
from trinity.data.permutation import Permutation
from trinity.rl.environments.environment import NoTools, Row, Session, Tool
from trinity.rl.rewards.attempt import Attempt, Rubric
from trinity.rl.rewards.constraints import all_followed, share_followed
from trinity.rl.rewards.form import final_number, has_box
from trinity.rl.rewards.integers import exact_integer


class SingleTurn:
    """What environments without tools share."""

    name: str
    tools: Sequence[Tool] = ()
    max_turns = 1

    def session(self, row: Row) -> Session:
        return NoTools()


def _exact(attempt: Attempt) -> float:
    return exact_integer(attempt.text, int(attempt.answer), finished=attempt.finished)


class Arithmetic(SingleTurn):
    """Sums, differences and products in symbols or words; the answer is a bare number."""

    name = "arithmetic"

    def __init__(self, seed: int, max_number: int = 99) -> None:
        self._seed, self._max = seed, max_number
        self.rubric = Rubric({"exact": _exact})

    def row(self, number: int, *, held_out: bool = False) -> Row:
        rng = Random(derive(self._seed, "arithmetic", int(held_out), number))
        question, answer = arithmetic.conversation(rng, self._max, held_out)["messages"]
        return Row([question], answer["content"])


class WordProblems(SingleTurn):
    """Questions with a number as answer, from a jsonl file with `question` and `answer`.

    The answer may be GSM8K's: a worked solution whose number follows `####`. `held_out` rows are the file's last part.
    """

    name = "word_problems"
    instruction = "\n\nThink step by step, then give the final number in \\boxed{}."

    def __init__(self, path: Path, seed: int, held_out_share: float = 0.05) -> None:
        self._seed = seed
        rows = [_worded(record, where, self.instruction) for where, record in _records(path)]
        last = max(1, round(len(rows) * held_out_share))
        self._parts = {False: rows[:-last], True: rows[-last:]}
        if not self._parts[False]:
            raise UserError(f"{path} has too few questions: with {len(rows)}, none is left to train on")
        self.rubric = Rubric({"right": final_number, "boxed": has_box}, {"right": 0.9, "boxed": 0.1})

    def row(self, number: int, *, held_out: bool = False) -> Row:
        return _shuffled(self._seed, self.name, self._parts[held_out], number)


class Instructions(SingleTurn):
    """Prompts with checkable instructions, from a jsonl file in IFEval's form: `prompt`, `instruction_id_list`,
    `kwargs`."""

    name = "instructions"

    def __init__(self, path: Path, seed: int) -> None:
        self._seed = seed
        self._rows = [_instructed(record, where) for where, record in _records(path)]
        self.rubric = Rubric({"all": all_followed, "share": share_followed}, {"all": 0.5, "share": 0.5})

    def row(self, number: int, *, held_out: bool = False) -> Row:
        if held_out:
            raise UserError("a file of instructions has no held-out part: name another file")
        return _shuffled(self._seed, self.name, self._rows, number)


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    found = list(read_objects(path))
    if not found:
        raise UserError(f"{path} holds no lines")
    return found


def _shuffled(seed: int, name: str, rows: Sequence[Row], number: int) -> Row:
    """Every row once in each pass, in an order of the pass's own."""
    turn, place = divmod(number, len(rows))
    order = Permutation(derive(seed, name, turn), len(rows))
    return rows[int(order(np.array([place]))[0])]


def _worded(record: Mapping[str, Any], where: str, instruction: str) -> Row:
    question, answer = record.get("question"), record.get("answer")
    if not isinstance(question, str) or not isinstance(answer, (str, int, float)):
        raise UserError(f"{where} has no text `question` with an `answer`")
    number = str(answer).rpartition("####")[2].strip().replace(",", "").removeprefix("$")
    try:
        float(number)
    except ValueError:
        raise UserError(f"{where}: the answer ends with {number[:40]!r}, which is no number") from None
    return Row([{"role": "user", "content": question.strip() + instruction}], number)


def _instructed(record: Mapping[str, Any], where: str) -> Row:
    try:
        kinds, settings = record["instruction_id_list"], record["kwargs"]
        constraints = list(zip(kinds, settings, strict=True))
        prompt = [{"role": "user", "content": str(record["prompt"])}]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where} has no `prompt`, `instruction_id_list` and `kwargs` of one length") from None
    return Row(prompt, info={"constraints": constraints})
