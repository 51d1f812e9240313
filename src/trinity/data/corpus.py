"""From the paths that a user names to a fixed sequence of documents."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from trinity.base.errors import UsageError, UserError
from trinity.data.readers import (
    DEFAULT_COLUMNS,
    Columns,
    Document,
    OnDrop,
    Piece,
    open_hub,
    open_table,
    read_piece,
    refuse,
)

CODE_DOMAIN = "code"
TEXT_DOMAIN = "text"
"""Domain of documents that neither the user nor the data name one for."""
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex")
LINES_SUFFIXES = (
    *(name + packed for name in (".jsonl", ".ndjson") for packed in ("", ".gz", ".zst")),
    ".json.gz",
    ".json.zst",
)
TABLE_SUFFIX = ".parquet"
_CODE = """
    asm bash c cc clj cmake cpp cs css cu cuh cxx dart el erl ex exs f90 go h hh hpp hs html java jl js jsx kt lisp lua
    m ml mli nim php pl proto py pyi pyx r rb rs s scala scm sh sql sv swift toml ts tsx v vhd vim xml yaml yml zig
"""
CODE_SUFFIXES = tuple(f".{name}" for name in _CODE.split())
KNOWN_TYPES = f"{', '.join((*TEXT_SUFFIXES, *LINES_SUFFIXES, TABLE_SUFFIX))} and source files of programs"
PACKED_TEXT_RATIO = 4
"""Bytes of text per compressed byte, to estimate work."""


@dataclass(frozen=True)
class Input:
    """A file, a folder or `hf://owner/name`, and the domain of all its documents if they should have one."""

    path: str
    domain: str | None = None

    @classmethod
    def parse(cls, text: "str | Path | Input") -> "Input":
        """`path` or `path=domain`; a path that exists as it stands is never split."""
        if isinstance(text, Input):
            return text
        path, equals, domain = str(text).rpartition("=")
        if not equals or Path(text).exists():
            return cls(str(text))
        if not path or not domain:
            raise UsageError(f"the input {str(text)!r} should read path or path=domain")
        return cls(path, domain)


Kind = Literal["text", "code", "lines", "table", "hub"]


@dataclass(frozen=True)
class InputFile:
    """A file as it was when it was listed, or a whole data set of the hub."""

    path: str
    size: int
    """Bytes on disk."""
    mtime_ns: int
    kind: Kind
    label: str
    """Name of the input that it belongs to."""
    inside: str
    """Path inside the input's folder; empty for an input that is a file."""
    domain: str | None

    @property
    def text_bytes(self) -> int:
        """Bytes of text, estimated."""
        packed = self.kind == "table" or self.path.endswith((".gz", ".zst"))
        return self.size * PACKED_TEXT_RATIO if packed else self.size


@dataclass(frozen=True)
class Listing:
    """The files of all inputs in their order, and how many files of unknown type were passed over."""

    files: list[InputFile]
    passed_over: int


def read_documents(
    inputs: "Iterable[str | Path | Input]",
    domain: str | None = None,
    columns: Columns = DEFAULT_COLUMNS,
    on_drop: OnDrop = refuse,
) -> Iterator[Document]:
    """Documents of files, folders and data sets, in a fixed order: inputs as given, the files of a folder sorted.

    `domain` is for inputs that name none of their own. A single bad document goes to `on_drop`, whose default raises
    UserError; a missing, truncated or damaged file and a missing column always raise it.
    """
    chosen = [Input.parse(one) for one in inputs]
    for file in list_files([replace(one, domain=one.domain or domain) for one in chosen]).files:
        for piece in cut_file(file):
            yield from read_piece(piece, columns, on_drop)


def list_files(inputs: Sequence[Input]) -> Listing:
    """Find the files of all inputs. Raises UserError for a path that is missing, empty or of unknown type."""
    files: list[InputFile] = []
    passed_over = 0
    for one in inputs:
        root = Path(one.path)
        if one.path.startswith("hf://"):
            files.append(InputFile(one.path, open_hub(one.path).data.nbytes, 0, "hub", one.path, "", one.domain))
        elif root.is_dir():
            before = len(files)
            for path in _walk(root):
                kind = _kind(path)
                if kind is None:
                    passed_over += 1
                else:
                    files.append(_listed(one, root, path, kind))
            if len(files) == before:
                raise UserError(f"the folder {root} holds no file of a known type ({KNOWN_TYPES})")
        elif root.is_file():
            kind = _kind(root)
            if kind is None:
                raise UserError(f"{root} is of no known type ({KNOWN_TYPES})")
            files.append(_listed(one, root, root, kind))
            if files[-1].size == 0:
                raise UserError(f"{root} is empty")
        else:
            raise UserError(f"there is no file or folder {root}")
    return Listing(files, passed_over)


def cut_together(files: Iterable[InputFile], size: int) -> Iterator[tuple[Piece, ...]]:
    """Consecutive pieces of all files, in runs that each stop once they reach `size` bytes of text."""
    pieces: list[Piece] = []
    held = 0
    for file in files:
        for piece in cut_file(file, size):
            pieces.append(piece)
            held += piece.size
            if held >= size:
                yield tuple(pieces)
                pieces, held = [], 0
    if pieces:
        yield tuple(pieces)


def cut_file(file: InputFile, piece_bytes: int | None = None) -> Iterator[Piece]:
    """Cut a file into pieces of about `piece_bytes` of text (default: one). Text and compressed files are never cut."""
    source = f"{file.label}/{file.inside}" if file.inside else file.label
    if file.kind in ("text", "code"):
        default = CODE_DOMAIN if file.kind == "code" else TEXT_DOMAIN
        yield Piece(file.path, "text", file.label, file.inside or file.label, file.domain, default, size=file.size)
    elif file.kind == "lines" and file.text_bytes != file.size:
        yield Piece(file.path, "lines", source, "", file.domain, TEXT_DOMAIN, size=file.text_bytes)
    elif file.kind == "lines":
        for start, stop in _strides(file.size, piece_bytes):
            yield Piece(file.path, "lines", source, "", file.domain, TEXT_DOMAIN, start, stop, stop - start)
    elif file.kind == "hub":
        rows = open_hub(file.path).num_rows
        row_bytes = max(1, file.size // max(1, rows))
        for start, stop in _strides(rows, piece_bytes and max(1, piece_bytes // row_bytes)):
            size = (stop - start) * row_bytes
            yield Piece(file.path, "hub", source, "", file.domain, TEXT_DOMAIN, start, stop, size)
    else:
        with open_table(file.path) as table:
            sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.metadata.num_row_groups)]
        for start, stop in _runs(sizes, piece_bytes):
            size = sum(sizes[start:stop])
            yield Piece(file.path, "table", source, "", file.domain, TEXT_DOMAIN, start, stop, size)


def _listed(one: Input, root: Path, path: Path, kind: Kind) -> InputFile:
    stat = path.stat()
    # Origins are told relative to the input, so that they do not depend on where the data lies.
    inside = path.relative_to(root).as_posix() if path != root else ""
    label = root.name or root.resolve().name
    return InputFile(str(path), stat.st_size, stat.st_mtime_ns, kind, label, inside, one.domain)


def _walk(root: Path) -> Iterator[Path]:
    """Files below a folder, sorted; hidden ones and byte code are left out, links to folders are not followed."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _kind(path: Path) -> Kind | None:
    name = path.name.lower()
    if name.endswith(TEXT_SUFFIXES):
        return "text"
    if name.endswith(LINES_SUFFIXES):
        return "lines"
    if name.endswith(TABLE_SUFFIX):
        return "table"
    return "code" if name.endswith(CODE_SUFFIXES) else None


def _strides(size: int, step: int | None) -> Iterator[tuple[int, int]]:
    step = step or max(1, size)
    for start in range(0, size, step):
        yield start, min(start + step, size)


def _runs(sizes: Sequence[int], limit: int | None) -> Iterator[tuple[int, int]]:
    """Cut a sequence of sizes into runs that each stop once they reach `limit`."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        total += size
        if limit is not None and total >= limit:
            yield start, index + 1
            start, total = index + 1, 0
    if start < len(sizes):
        yield start, len(sizes)
