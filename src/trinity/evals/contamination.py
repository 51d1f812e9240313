"""Whether training data hold the questions of a test: `data.overlap` over the files of both."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trinity.data.corpus import read_documents
from trinity.data.overlap import SHORTEST, N, Overlap, question_text, words
from trinity.data.records import read_records

__all__ = ["SHORTEST", "N", "Overlap", "find_overlap", "question_text", "training_texts", "words"]


def training_texts(path: str) -> Iterator[tuple[str, str]]:
    """(where, text) of every document, conversation or worked question of an input."""
    file = Path(path)
    if file.is_file() and file.name.removesuffix(".gz").endswith(".jsonl"):
        for number, record in enumerate(read_records(file, {}), start=1):
            if "messages" in record:
                parts = [turn.get("content") for turn in record["messages"] if isinstance(turn, dict)]
            else:
                parts = [record.get(name) for name in ("text", "question", "prompt", "solution", "answer", "rationale")]
            yield f"{file.name}, line {number}", "\n".join(part for part in parts if isinstance(part, str))
        return
    for document in read_documents([path]):
        yield f"{document.source}/{document.id}", document.text


def find_overlap(inputs: Iterable[str], tests: Iterable[Path], n: int = N) -> dict[str, dict[str, Any]]:
    """`Overlap.report` of the questions of `tests` in the texts of `inputs`. Raises UserError for unreadable files."""
    overlap = Overlap(n)
    for path in tests:
        name = path.name.removesuffix(".gz").removesuffix(".jsonl")
        for number, record in enumerate(read_records(path, {}), start=1):
            overlap.add(name, str(record.get("id", record.get("task_id", number))), question_text(record))
    for path in inputs:
        for where, text in training_texts(path):
            overlap.read(where, text)
    return overlap.report()
