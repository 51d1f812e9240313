"""Files of JSON objects, one a line, plain or compressed."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from trinity.base.errors import UserError


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, object) of each line of a .jsonl, .jsonl.gz or .jsonl.zst file that is not blank.

    Raises UserError, naming file and line, for what is missing, of another kind, cut off, not UTF-8 or not an object.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where} is not JSON: {error}") from None
                if not isinstance(record, dict):
                    raise UserError(f"{where} is a JSON {type(record).__name__}, not an object")
                yield where, record
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read after line {number}: {error}") from None


def _open(path: Path) -> io.TextIOBase:
    if path.name.endswith(".jsonl"):
        return path.open(encoding="utf-8")
    if path.name.endswith(".jsonl.gz"):
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8")
    if path.name.endswith(".jsonl.zst"):
        return io.TextIOWrapper(zstandard.open(path, "rb"), encoding="utf-8")
    raise UserError(f"{path} is no file of JSON lines: use .jsonl, .jsonl.gz or .jsonl.zst")
