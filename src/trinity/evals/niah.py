"""Multi-key needle in a haystack (MK-NIAH), as RULER defines it (arXiv 2404.06654): several `key -> number` needles in
a long text, one of them asked for. A grid of lengths (whole prompt and answer, in tokens) and depths (where the needle
that is asked for stands: 0 at the start, 1 at the end).

`retrieval_document` makes training documents of the same kind from the other half of the material (`needles.py`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trinity.base.errors import UserError
from trinity.base.rng import Draws, derive
from trinity.config import EvalConfig
from trinity.evals.generation import Complete
from trinity.evals.needles import (
    EVALUATION_WORDINGS,
    TRAINING_WORDINGS,
    Half,
    Haystack,
    Wording,
    draw_keys,
    draw_values,
)
from trinity.tokenizer import Tokenizer

DIGITS = 7  # of a value, as in RULER


@dataclass(frozen=True)
class Question:
    """One prompt of the grid. `tokens` ends where the answer is due; `answer` is the number's digits."""

    tokens: list[int]
    answer: str
    length: int
    depth: float


def grid(num_depths: int) -> list[float]:
    """Evenly spread depths from 0 to 1; a single one stands in the middle."""
    return [0.5] if num_depths == 1 else [i / (num_depths - 1) for i in range(num_depths)]


def questions(
    tokenizer: Tokenizer, settings: EvalConfig, seed: int = 0, haystack: Haystack | None = None
) -> list[Question]:
    """The questions of every cell; the same seed gives the same ones, whatever the other lengths and depths are.

    A prompt and its answer together have at most `length` tokens, short of it by less than one sentence. Raises
    UserError when a length has no room for the needles.
    """
    haystack = haystack or Haystack(Half.EVALUATION)
    assert haystack.half is Half.EVALUATION
    found = []
    for length in settings.niah_lengths:
        for depth in grid(settings.niah_depths):
            for sample in range(settings.niah_samples):
                draws = Draws(derive(seed, "niah", length, round(depth * 10**6), sample))
                wording = EVALUATION_WORDINGS[draws.below(len(EVALUATION_WORDINGS))]
                keys = draw_keys(draws, settings.niah_keys, Half.EVALUATION)
                values = draw_values(draws, settings.niah_keys, Half.EVALUATION, DIGITS)
                tail = tokenizer.encode(wording.ask.format(key=keys[0]))
                reserve = len(tail) + len(tokenizer.encode(f" {values[0]}"))
                text = _haystack_with_needles(
                    tokenizer, draws, wording, keys, values, depth, length - reserve, haystack
                )
                found.append(Question(text + tail, values[0], length, depth))
    return found


def retrieval_document(
    tokenizer: Tokenizer, length: int, num_keys: int, seed: int, index: int, haystack: Haystack | None = None
) -> np.ndarray:
    """Training document number `index`: needles in a haystack, then every key asked for and answered; ends with eos.

    At most `length` tokens, int64. Keys, values, wordings and haystack are of the training half. Any index can be made
    without the ones before it.
    """
    haystack = haystack or Haystack(Half.TRAINING)
    assert haystack.half is Half.TRAINING
    draws = Draws(derive(seed, "retrieval", index))
    wording = TRAINING_WORDINGS[draws.below(len(TRAINING_WORDINGS))]
    keys = draw_keys(draws, num_keys, Half.TRAINING)
    values = draw_values(draws, num_keys, Half.TRAINING, DIGITS)
    tail: list[int] = []
    for i in range(num_keys):
        tail += tokenizer.encode(f"{wording.ask.format(key=keys[i])} {values[i]}.")
    tail.append(tokenizer.eos_id)
    depth = draws.below(1001) / 1000
    body = _haystack_with_needles(tokenizer, draws, wording, keys, values, depth, length - len(tail), haystack)
    return np.asarray(body + tail, dtype=np.int64)


def document_size(tokenizer: Tokenizer, num_keys: int) -> int:
    """Tokens that a retrieval document needs beside its haystack, at most (by a sample of keys, and a quarter on
    top)."""
    draws = Draws(derive(0, "size"))
    sizes = []
    for wording in TRAINING_WORDINGS:
        pairs = zip(draw_keys(draws, 16, Half.TRAINING), draw_values(draws, 16, Half.TRAINING, DIGITS), strict=True)
        texts = [f" {wording.needle.format(key=k, value=v)}{wording.ask.format(key=k)} {v}." for k, v in pairs]
        longest = max(len(ids) for ids in map(tokenizer.encode, texts))
        sizes.append(len(tokenizer.encode(wording.intro)) + num_keys * longest + 1)
    return max(sizes) * 5 // 4


def _haystack_with_needles(
    tokenizer: Tokenizer,
    draws: Draws,
    wording: Wording,
    keys: Sequence[str],
    values: Sequence[str],
    depth: float,
    budget: int,
    haystack: Haystack,
) -> list[int]:
    """At most `budget` tokens: the intro, and sentences between which the needles stand, the first one at `depth`.

    Sentences are encoded on their own and joined as token lists, so lengths add up exactly.
    """
    intro = tokenizer.encode(wording.intro)
    needles = [tokenizer.encode(" " + wording.needle.format(key=k, value=v)) for k, v in zip(keys, values, strict=True)]
    room = budget - len(intro) - sum(map(len, needles))
    if room < 0:
        raise UserError(
            f"a haystack with {len(keys)} needles needs {-room} tokens more than its length allows; "
            "use longer rows (eval.niah_lengths, extend.seq_len) or fewer needles (eval.niah_keys)"
        )
    pieces: list[list[int]] = []
    used = 0
    for sentence in haystack.sentences(draws):
        piece = tokenizer.encode(" " + sentence)
        if used + len(piece) > room:
            # A sentence of a real document may be longer than a short haystack: its start is taken.
            if not pieces and room:
                pieces.append(piece[:room])
            break
        pieces.append(piece)
        used += len(piece)
    ends = np.concatenate([[0], np.cumsum([len(p) for p in pieces])]) if pieces else np.zeros(1, dtype=np.int64)
    asked = int(np.abs(ends - depth * ends[-1]).argmin())
    slots = [asked, *(draws.below(len(ends)) for _ in needles[1:])]
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


def score_record(asked: Sequence[Question], completions: Sequence[str]) -> dict[str, Any]:
    """`{score, standard_error, samples, grid: [{length, depth, score, samples}]}`; score is the share answered
    exactly."""
    right = [is_correct(text, q.answer) for q, text in zip(asked, completions, strict=True)]
    cells: dict[tuple[int, float], list[bool]] = {}
    for question, ok in zip(asked, right, strict=True):
        cells.setdefault((question.length, question.depth), []).append(ok)
    score = sum(right) / len(right)
    return {
        "score": score,
        "standard_error": (score * (1 - score) / len(right)) ** 0.5,
        "samples": len(right),
        "grid": [
            {"length": length, "depth": depth, "score": sum(oks) / len(oks), "samples": len(oks)}
            for (length, depth), oks in sorted(cells.items())
        ],
    }


def score_at(record: dict[str, Any], length: int) -> float:
    """Mean score of a record's cells of one length."""
    scores = [cell["score"] for cell in record["grid"] if cell["length"] == length]
    return sum(scores) / len(scores)


def evaluate(complete: Complete, tokenizer: Tokenizer, asked: Sequence[Question]) -> dict[str, Any]:
    """Answer every question greedily and score; the record of `score_record`."""
    longest = max(len(tokenizer.encode(f" {q.answer}.")) for q in asked)
    return score_record(asked, complete([q.tokens for q in asked], longest + 2))
