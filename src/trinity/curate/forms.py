"""The forms that answers come in: read out of what the model wrote, or the reason why that is not possible."""

import ast
import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, Protocol

from trinity.curate.exact import final_answer, number_in, value, wrong_equations
from trinity.curate.recipes import Checks, Form


class CodeRunner(Protocol):
    """Runs programs that a model wrote, isolated from the machine and the network."""

    def passes(self, program: str, *, seconds: float) -> bool:
        """Whether the program ends by itself with status 0 within `seconds`."""
        ...


MakeRunner = Callable[[], CodeRunner]
"""Makes one in the process that needs it; a function of a module, so that workers elsewhere can."""


class Read(NamedTuple):
    """`text` is what goes on; `reason` says why nothing does."""

    text: str
    reason: str | None = None


_THINKING = re.compile(r"^\s*<think>.*?</think>\s*", re.DOTALL)
_FENCED = re.compile(r"^```[a-zA-Z]*\n(.*?)\n?```$", re.DOTALL)
_PYTHON = re.compile(r"^```(?:python|py|python3)[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
_PAIR = re.compile(r"^Q:[ \t]*(.+?)\n+A:[ \t]*(.+?)(?=\n+Q:|\Z)", re.DOTALL | re.MULTILINE)
_TURN = re.compile(r"^\**([^\s:*][^:\n*]{0,40})\**[:\uff1a]\**[ \t]*(\S.*)$", re.MULTILINE)
_ITEM = re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])[ \t]+(\S.*)$", re.MULTILINE)
_ROW = re.compile(r"^\|(.+)\|[ \t]*$", re.MULTILINE)
_RULE = re.compile(r"^[\s|:-]+$")
_FIELD = r"^{}:[ \t]*(.+?)(?=^(?:Problem|Solution|Answer|Check|Question):|\Z)"


def plain(answer: str) -> str:
    """An answer without a block of thoughts before it and one fence around all of it."""
    text = _THINKING.sub("", answer).strip()
    fenced = _FENCED.match(text)
    return fenced.group(1).strip() if fenced and "```" not in fenced.group(1) else text


def read_form(form: Form, answer: str, passage: str, checks: Checks) -> Read:
    """The text of an answer in its form. Code is read here and run by `run_code`; retrieval is put together later."""
    text = _THINKING.sub("", answer).strip() if form == "code" else plain(answer)
    readers = {
        "pairs": _pairs,
        "dialogue": _dialogue,
        "table": _table,
        "list": _list,
        "json": _json,
        "code": _code,
        "mathematics": _mathematics,
        "retrieval": _retrieval,
    }
    reader = readers.get(form)
    return Read(text) if reader is None else reader(text, passage, checks)


def _pairs(text: str, passage: str, checks: Checks) -> Read:
    found = _PAIR.findall(text)
    if len(found) < checks.min_items:
        return Read("", "too few pairs")
    if len({question.strip() for question, _ in found}) < len(found):
        return Read("", "a question twice")
    return Read("\n\n".join(f"Q: {question.strip()}\nA: {answer.strip()}" for question, answer in found))


def _dialogue(text: str, passage: str, checks: Checks) -> Read:
    turns = _TURN.findall(text)
    if len(turns) < checks.min_items:
        return Read("", "too few turns")
    speakers = [name.strip() for name, _ in turns]
    if not 2 <= len(set(speakers)) <= 6:
        return Read("", "not a conversation")
    if sum(one == other for one, other in pairwise(speakers)) > len(turns) // 2:
        return Read("", "not a conversation")
    return Read(text)


def _table(text: str, passage: str, checks: Checks) -> Read:
    rows = [[cell.strip() for cell in row.split("|")] for row in _ROW.findall(text)]
    if len(rows) < 2 + checks.min_items or not all(_RULE.match(cell) for cell in rows[1] if cell) or not any(rows[1]):
        return Read("", "no table")
    if len({len(row) for row in rows}) > 1 or len(rows[0]) < 2:
        return Read("", "rows of unequal length")
    return Read(text)


def _list(text: str, passage: str, checks: Checks) -> Read:
    items = [item.strip() for item in _ITEM.findall(text)]
    if len(items) < checks.min_items:
        return Read("", "too few points")
    return Read(text) if len(set(items)) == len(items) else Read("", "a point twice")


def _json(text: str, passage: str, checks: Checks) -> Read:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return Read("", "not JSON")
    if not isinstance(found, dict) or len(found) < checks.min_items:
        return Read("", "no object with enough entries")
    return Read(json.dumps(found, ensure_ascii=False, indent=2))


def _mathematics(text: str, passage: str, checks: Checks) -> Read:
    parts = {name: _field(name, text) for name in ("Problem", "Solution", "Answer", "Check")}
    if not all(parts[name] for name in ("Problem", "Solution", "Answer")):
        return Read("", "problem, solution or answer missing")
    answer = number_in(parts["Answer"])
    if answer is None:
        return Read("", "the answer is no number")
    known = final_answer(passage)
    if known is not None:
        if known != answer:
            return Read("", "not the known answer")
    elif not parts["Check"] or value(parts["Check"].strip().strip("$`. ")) != answer:
        return Read("", "the answer fails its check")
    if next(wrong_equations(parts["Solution"]), None) is not None:
        return Read("", "a wrong calculation")
    return Read(f"{parts['Problem']}\n\n{parts['Solution']}\n\nAnswer: {parts['Answer']}")


def _field(name: str, text: str) -> str:
    found = re.search(_FIELD.format(name), text, re.DOTALL | re.MULTILINE)
    return found.group(1).strip() if found else ""


def _retrieval(text: str, passage: str, checks: Checks) -> Read:
    question, answer = _field("Question", text), _field("Answer", text).strip().strip('"“”').rstrip(".")
    if not question or not answer:
        return Read("", "question or answer missing")
    if answer not in passage:
        return Read("", "the answer is not in the passage")
    if len(answer) > 200 or len(answer) < 2:
        return Read("", "the answer is no short quotation")
    if answer.lower() in question.lower():
        return Read("", "the question gives the answer")
    return Read(f"Question: {question}\nAnswer: {answer}")


def _code(text: str, passage: str, checks: Checks) -> Read:
    blocks = _PYTHON.findall(text)
    if len(blocks) != 2:
        return Read("", "not one program and its tests")
    try:
        program, tests = (ast.parse(block) for block in blocks)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Read("", "no valid program")
    made = [n for n in ast.walk(program) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)]
    defined = {n.name for n in made}
    asserts = [n for n in ast.walk(tests) if isinstance(n, ast.Assert)]
    using = sum(any(isinstance(n, ast.Name) and n.id in defined for n in ast.walk(a)) for a in asserts)
    if using < checks.min_items:
        return Read("", "too few tests of the program")
    return Read(text)


def run_code(text: str, runner: CodeRunner, seconds: float) -> str | None:
    """The reason to drop a program, or None: its tests must hold with it and fail without it."""
    program, tests = _PYTHON.findall(text)
    if not runner.passes(f"{program}\n\n{tests}", seconds=seconds):
        return "the tests fail"
    if runner.passes(tests, seconds=seconds):
        return "the tests hold without the program"
    return None
