"""Answers as they come in, one line each, so that a kill loses only those under way.

`WORK/answers/BLOCK.WRITER.jsonl`: every writer has files of its own. Of two answers to one request, as when a worker
was lost and the work done again elsewhere, the first in the order of the file names counts, failures last.
"""

import json
import os
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from trinity.base.errors import UserError
from trinity.base.files import FULL, read_jsonl


@dataclass(frozen=True)
class Answer:
    """What came of a request: a text, or the failure that ended the attempts."""

    key: str
    text: str
    failure: str = ""
    finish: str = ""
    """As the server says: stop, length."""
    model: str = ""
    endpoint: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Over all attempts."""
    money: float = 0.0
    seconds: float = 0.0
    attempts: int = 1
    troubles: dict[str, int] = field(default_factory=dict)
    """What went wrong in attempts, by kind."""

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        return cls(**record)


class Journal:
    """Appends the answers of one block; a context manager."""

    def __init__(self, work: Path, block: int) -> None:
        folder = work / "answers"
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{block:06d}.{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        self._file = self._path.open("ab", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def write(self, answer: Answer) -> None:
        """One line in one write. Raises UserError when the disk is full."""
        line = json.dumps(asdict(answer), ensure_ascii=False, separators=(",", ":")) + "\n"
        try:
            self._file.write(line.encode("utf-8", "replace"))
        except OSError as error:
            if error.errno in FULL:
                raise UserError(f"the disk is full: {self._path} could not be continued") from error
            raise


def read_answers(work: Path, block: int) -> dict[str, Answer]:
    """Answers of a block by request. A line that a kill cut off is left out."""
    found: dict[str, Answer] = {}
    for path in sorted((work / "answers").glob(f"{block:06d}.*.jsonl")):
        for record in read_jsonl(path):
            answer = Answer.from_json(record)
            if answer.key not in found or (found[answer.key].failure and not answer.failure):
                found[answer.key] = answer
    return found


def spent(work: Path) -> tuple[int, float]:
    """(tokens, money) of all answers so far, those of repeated work included."""
    tokens, money = 0, 0.0
    for path in sorted((work / "answers").glob("*.jsonl")):
        for record in read_jsonl(path):
            tokens += record["prompt_tokens"] + record["completion_tokens"]
            money += record["money"]
    return tokens, money
