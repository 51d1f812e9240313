"""Needles in a haystack as RULER defines them (arXiv 2404.06654): sentences with numbers stand in a long text, and some
of the numbers are asked for. A grid of lengths (whole prompt and answer, in tokens) and depths (where the needle that
is asked for stands: 0 at the start, 1 at the end) for each task:

- multikey (MK-NIAH): several keys, one asked for. single: one key only.
- multivalue: one key with several numbers. multiquery: several keys, all asked for.
- tracking: names that stand for a value through each other.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from trinity.base.errors import UserError
from trinity.base.rng import Draws, derive
from trinity.config import EvalConfig
from trinity.evals.generation import Complete
from trinity.evals.needles import (
    ONE,
    SEVERAL,
    TRACKING,
    Half,
    Haystack,
    Wording,
    draw_keys,
    draw_names,
    draw_values,
)
from trinity.tokenizer import Tokenizer

DIGITS = 7  # of a value, as in RULER
TRACKED_DIGITS = 5
SEVERAL_VALUES = 4  # of a multivalue or multiquery question
HOPS = 4  # of a chain of variables


@dataclass(frozen=True)
class Question:
    """One prompt of the grid. `tokens` ends where the answer is due; `answers` are all that it must hold."""

    tokens: list[int]
    answers: tuple[str, ...]
    length: int
    depth: float
    task: str = "multikey"

    @property
    def answer(self) -> str:
        return ", ".join(self.answers)


@dataclass(frozen=True)
class _Riddle:
    """What is hidden and asked for: needles, of which the first `placed` stand at given depths, and `ask`s of which
    number i is about needle i."""

    wording: Wording
    needles: list[str]
    asks: list[str]
    answers: list[tuple[str, ...]]
    in_order: bool = False


def grid(num_depths: int) -> list[float]:
    """Evenly spread depths from 0 to 1; a single one stands in the middle."""
    return [0.5] if num_depths == 1 else [i / (num_depths - 1) for i in range(num_depths)]


def questions(
    tokenizer: Tokenizer, settings: EvalConfig, seed: int = 0, haystack: Haystack | None = None
) -> list[Question]:
    """The questions of every cell; the same seed gives the same ones, whatever the other lengths and depths are.

    A prompt and its answer together have at most `length` tokens, short of it by less than one sentence. With
    `niah_reuse` the questions of all depths have one text. Raises UserError when a length has no room for the needles.
    """
    haystack = haystack or Haystack(Half.EVALUATION)
    assert haystack.half is Half.EVALUATION
    depths = grid(settings.niah_depths)
    found = []
    for task in settings.niah_tasks:
        together = settings.niah_reuse and task in ("multikey", "single")
        for length in settings.niah_lengths:
            for some in [depths] if together else [[depth] for depth in depths]:
                for sample in range(settings.niah_samples):
                    path: list[int | str] = [length, round(some[0] * 10**6), sample]
                    if task != "multikey":
                        path = [task, *path]
                    if together:
                        path = ["together", len(depths), *path]
                    draws = Draws(derive(seed, "niah", *path))
                    riddle = _riddle(task, draws, settings.niah_keys, len(some))
                    found += _ask(tokenizer, draws, riddle, some, length, haystack, task)
    return found


def _riddle(task: str, draws: Draws, num_keys: int, asked: int) -> _Riddle:
    half = Half.EVALUATION
    if task in ("multikey", "single"):
        count = max(asked, num_keys if task == "multikey" else 1)
        keys, values = draw_keys(draws, count, half), draw_values(draws, count, half, DIGITS)
        needles = [ONE.needle.format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
        asks = [ONE.ask.format(key=key) for key in keys[:asked]]
        return _Riddle(ONE, needles, asks, [(value,) for value in values[:asked]])
    if task == "tracking":
        names = draw_names(draws, HOPS + 1, half)
        value = draw_values(draws, 1, half, TRACKED_DIGITS)[0]
        needles = [TRACKING.needle.format(key=names[0], value=value)]
        needles += [TRACKING.needle.format(key=new, value=f"VAR {old}") for old, new in pairwise(names)]
        ask = TRACKING.ask.format(key=value, count=len(names))
        return _Riddle(TRACKING, needles, [ask], [tuple(names)], in_order=True)
    several = draw_values(draws, SEVERAL_VALUES, half, DIGITS)
    if task == "multivalue":
        keys = draw_keys(draws, 1, half) * SEVERAL_VALUES
        ask = SEVERAL.ask.format(key=keys[0])
    else:
        keys = draw_keys(draws, SEVERAL_VALUES, half)
        ask = SEVERAL.ask.format(key=f"{', '.join(keys[:-1])}, and {keys[-1]}")
    needles = [SEVERAL.needle.format(key=k, value=v) for k, v in zip(keys, several, strict=True)]
    return _Riddle(SEVERAL, needles, [ask], [tuple(several)])


def _ask(
    tokenizer: Tokenizer,
    draws: Draws,
    riddle: _Riddle,
    depths: Sequence[float],
    length: int,
    haystack: Haystack,
    task: str,
) -> list[Question]:
    tails = [tokenizer.encode(ask) for ask in riddle.asks]
    reserve = max(
        len(tail) + len(tokenizer.encode(f" {', '.join(answers)}"))
        for tail, answers in zip(tails, riddle.answers, strict=True)
    )
    text = _haystack_with_needles(tokenizer, draws, riddle, depths, length - reserve, haystack)
    return [
        Question(text + tail, answers, length, depth, task)
        for tail, answers, depth in zip(tails, riddle.answers, depths, strict=True)
    ]


def _haystack_with_needles(
    tokenizer: Tokenizer, draws: Draws, riddle: _Riddle, depths: Sequence[float], budget: int, haystack: Haystack
) -> list[int]:
    """At most `budget` tokens: the intro, and sentences between which the needles stand, the first ones at `depths`.

    Sentences are encoded on their own and joined as token lists, so lengths add up exactly.
    """
    intro = tokenizer.encode(riddle.wording.intro)
    needles = [ids.tolist() for ids in tokenizer.encode_batch([f" {needle}" for needle in riddle.needles])]
    room = budget - len(intro) - sum(map(len, needles))
    if room < 0:
        raise UserError(
            f"a haystack with {len(needles)} needles needs {-room} tokens more than its length allows; "
            "use longer rows (eval.niah_lengths) or fewer needles (eval.niah_keys)"
        )
    pieces: list[list[int]] = []
    used = 0
    for piece in haystack.pieces(draws, tokenizer.encode_batch):
        if used + len(piece) > room:
            # A sentence of a real document may be longer than a short haystack: its start is taken.
            if not pieces and room:
                pieces.append(piece[:room])
            break
        pieces.append(piece)
        used += len(piece)
    ends = np.concatenate([[0], np.cumsum([len(p) for p in pieces])]) if pieces else np.zeros(1, dtype=np.int64)
    slots = [int(np.abs(ends - depth * ends[-1]).argmin()) for depth in depths]
    first = slots[0] if riddle.in_order else 0
    others = [first + draws.below(len(ends) - first) for _ in needles[len(slots) :]]
    slots += sorted(others) if riddle.in_order else others
    tokens = list(intro)
    for i in range(len(ends)):
        for needle, slot in zip(needles, slots, strict=True):
            if slot == i:
                tokens += needle
        if i < len(pieces):
            tokens += pieces[i]
    return tokens


def is_correct(completion: str, answer: str) -> bool:
    """Whether the first number of the completion is the answer, to the digit."""
    number = re.search(r"\d+", completion)
    return number is not None and number.group() == answer


def score(completion: str, question: Question) -> float:
    """1 or 0 for a question with one answer: its first number is it; else the share of the answers that it holds, as
    RULER counts."""
    if len(question.answers) == 1:
        return float(is_correct(completion, question.answers[0]))
    words = set(re.findall(r"\w+", completion))
    return sum(answer in words for answer in question.answers) / len(question.answers)


def score_record(asked: Sequence[Question], completions: Sequence[str]) -> dict[str, Any]:
    """`{score, standard_error, samples, grid: [{task, length, depth, score, samples}], tasks: {name: score}}`."""
    scores = [score(text, q) for q, text in zip(asked, completions, strict=True)]
    cells: dict[tuple[str, int, float], list[float]] = {}
    tasks: dict[str, list[float]] = {}
    for question, value in zip(asked, scores, strict=True):
        cells.setdefault((question.task, question.length, question.depth), []).append(value)
        tasks.setdefault(question.task, []).append(value)
    order = list(tasks)
    return {
        "score": float(np.mean(scores)),
        "standard_error": float(np.std(scores) / len(scores) ** 0.5),
        "samples": len(scores),
        "tasks": {name: float(np.mean(values)) for name, values in tasks.items()},
        "grid": [
            {"task": task, "length": length, "depth": depth, "score": sum(values) / len(values), "samples": len(values)}
            for (task, length, depth), values in sorted(
                cells.items(), key=lambda item: (order.index(item[0][0]), *item[0][1:])
            )
        ],
    }


def score_at(record: dict[str, Any], length: int) -> float:
    """Mean score of the cells of one length, of the first task."""
    first = record["grid"][0]["task"]
    scores = [cell["score"] for cell in record["grid"] if cell["length"] == length and cell["task"] == first]
    return sum(scores) / len(scores)


def evaluate(complete: Complete, tokenizer: Tokenizer, asked: Sequence[Question]) -> dict[str, Any]:
    """Answer every question greedily and score; the record of `score_record`."""
    longest = max(len(tokenizer.encode(f" {q.answer}.")) for q in asked)
    return score_record(asked, complete([q.tokens for q in asked], longest + 2))
