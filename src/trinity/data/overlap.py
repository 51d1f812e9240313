"""N-grams of words that training texts and the questions of a test both have.

A question is touched when one of its n-grams of n words (13 by default, as for GPT-3) stands in a training text, and
covered by the share of its n-grams that do. Words are lower case without punctuation, so that layout hides nothing.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MOST_WORDS = 1 << 20  # of a text that are looked at together
N = 13
SHORTEST = 8
"""Questions of fewer words say too little to be recognised by."""


@dataclass
class _Question:
    test: str
    id: str
    length: int
    keys: np.ndarray
    seen: set[int] = field(default_factory=set)
    where: str = ""


@dataclass(frozen=True)
class _Index:
    keys: np.ndarray
    """Sorted."""
    questions: dict[int, list[int]]
    """Numbers of the questions that have the key."""


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


class Overlap:
    """Tests are added first, then training texts are read past it, then `report` tells."""

    def __init__(self, n: int = N) -> None:
        assert n >= 2
        self.n = n
        self._numbers: dict[str, int] = {}  # of the words that occur in tests, from 1; 0 is every other word
        self._questions: list[_Question] = []
        self._short: dict[str, int] = {}
        self._lengths: set[int] = set()
        self._index: dict[int, _Index] = {}

    def add(self, test: str, id: str, text: str) -> None:
        """A question of a test. One of fewer than n words is looked for as a whole."""
        found = words(text)
        if len(found) < min(SHORTEST, self.n):
            self._short[test] = self._short.get(test, 0) + 1
            return
        numbers = np.array([self._numbers.setdefault(word, len(self._numbers) + 1) for word in found], np.uint64)
        length = min(self.n, len(found))
        self._lengths.add(length)
        self._questions.append(_Question(test, id, length, _keys(numbers, length)))
        self._index.clear()

    def read(self, where: str, text: str) -> None:
        """A training text; `where` names it in the report."""
        for key, question in self._hits(text):
            question.seen.add(key)
            question.where = question.where or where

    def touched_by(self, text: str) -> str | None:
        """`TEST/ID` of a question that the text touches, or None; leaves the report as it is."""
        return next((f"{question.test}/{question.id}" for _, question in self._hits(text)), None)

    def _hits(self, text: str) -> "Iterator[tuple[int, _Question]]":
        """N-grams of the text that questions have, with each of these questions."""
        found = words(text)
        for start in range(0, len(found), _MOST_WORDS):
            part = found[start : start + _MOST_WORDS + self.n - 1]
            numbers = np.array([self._numbers.get(word, 0) for word in part], np.uint64)
            for length, index in self._by_length().items():
                if len(numbers) < length:
                    continue
                keys = _keys(numbers, length)
                # No window with a word that no test has.
                unknown = np.concatenate([[0], np.cumsum(numbers == 0)])
                keys = keys[unknown[length:] == unknown[:-length]]
                places = np.searchsorted(index.keys, keys)
                places[places == len(index.keys)] = 0
                for key in set(keys[index.keys[places] == keys].tolist()):
                    for number in index.questions[key]:
                        yield key, self._questions[number]

    def _by_length(self) -> dict[int, "_Index"]:
        """Question numbers by n-gram, by length of the n-gram."""
        if not self._index and self._questions:
            found: dict[int, dict[int, list[int]]] = {length: {} for length in sorted(self._lengths)}
            for number, question in enumerate(self._questions):
                for key in set(question.keys.tolist()):
                    found[question.length].setdefault(key, []).append(number)
            for length, questions in found.items():
                self._index[length] = _Index(np.array(sorted(questions), np.uint64), questions)
        return self._index

    def report(self, most_examples: int = 5) -> dict[str, dict[str, Any]]:
        """By test: questions, too short ones, touched ones, those covered by half and more, and examples."""
        found: dict[str, dict[str, Any]] = {}
        for test in sorted({q.test for q in self._questions} | self._short.keys()):
            mine = [q for q in self._questions if q.test == test]
            coverage = [len(q.seen) / len(set(q.keys.tolist())) for q in mine]
            touched = [(share, q) for share, q in zip(coverage, mine, strict=True) if q.seen]
            touched.sort(key=lambda pair: -pair[0])
            found[test] = {
                "questions": len(mine),
                "too_short": self._short.get(test, 0),
                "touched": len(touched),
                "share": len(touched) / max(1, len(mine)),
                "covered_by_half": sum(share >= 0.5 for share in coverage),
                "examples": [{"id": q.id, "coverage": share, "where": q.where} for share, q in touched[:most_examples]],
            }
        return found


def _keys(numbers_N: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit key of every window of `length` words; of words that are equal the keys are equal."""
    count = len(numbers_N) - length + 1
    keys = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(length):
            keys = (keys ^ numbers_N[offset : offset + count]) * _FACTOR
            keys ^= keys >> np.uint64(29)
    return keys


def question_text(record: dict[str, Any]) -> str:
    """The text of a benchmark's record that must not be trained on: its question, or what stands for it."""
    for name in ("question", "sentence", "prompt", "context", "text", "passage", "code"):
        if isinstance(record.get(name), str):
            return record[name]
    return ""
