"""Local files of questions: one JSON object a line, plain or gzip."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from trinity.base.errors import UserError

Record = dict[str, Any]


def fields_text(fields: dict[str, str]) -> str:
    return ", ".join(f"{name} ({what})" for name, what in fields.items())


def read_records(path: Path, fields: dict[str, str]) -> list[Record]:
    """All lines of a file. Raises UserError that names file and line for what is not such a file."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
        lacking = [name for name in fields if not isinstance(record, dict) or name not in record]
        if lacking:
            raise UserError(f"{path}, line {number} has no field {lacking[0]!r}; it needs {fields_text(fields)}")
        records.append(record)
    if not records:
        raise UserError(f"{path} holds no questions")
    return records
