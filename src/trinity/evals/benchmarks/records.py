"""Local files of questions: one JSON object a line, plain or gzip."""

import hashlib
from pathlib import Path

from trinity.data.records import Record, fields_text, read_records

__all__ = ["Record", "checksum", "fields_text", "find_file", "missing_file", "read_records"]


def find_file(directory: Path, name: str) -> Path | None:
    """`NAME.jsonl.gz` or `NAME.jsonl` in `directory`."""
    for ending in (".jsonl.gz", ".jsonl"):
        if (directory / f"{name}{ending}").is_file():
            return directory / f"{name}{ending}"
    return None


def missing_file(directory: Path, name: str, fields: dict[str, str], source: str) -> str:
    """A sentence that says where a file belongs and what its lines hold."""
    return (
        f"there is no {directory / name}.jsonl.gz: put {source} there, a JSON object a line with {fields_text(fields)}"
    )


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
