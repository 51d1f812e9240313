"""Reading one stretch of one input file: text files, JSON lines (plain, gzip, zstd) and parquet."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trinity.base.errors import UserError

CHUNK_BYTES = 1 << 20
ROWS_AT_ONCE = 256


class Document(NamedTuple):
    """One text with its origin."""

    text: str
    domain: str
    source: str
    """The data set or the input's name; few distinct values."""
    id: str
    """Which document of the source: a value of the id column, a path inside a folder, a byte offset or a row number."""


@dataclass(frozen=True)
class Columns:
    """Names of the fields in JSON lines and tables; all but `text` may be absent from the data."""

    text: str = "text"
    domain: str = "domain"
    source: str = "source"
    id: str = "id"


DEFAULT_COLUMNS = Columns()


@dataclass(frozen=True)
class Piece:
    """A stretch of one input that can be read by itself, in any process."""

    path: str
    kind: Literal["text", "lines", "table", "hub"]
    source: str
    id: str = ""
    domain: str | None = None
    """Set by the user: goes before the domain column."""
    default_domain: str = "text"
    start: int = 0
    """First byte (lines), row group (table) or row (hub)."""
    stop: int = 0
    size: int = 0
    """Bytes of text, estimated."""


class Drop(NamedTuple):
    """A single document that cannot be used."""

    reason: str
    where: str
    """File and line or offset."""
    detail: str


OnDrop = Callable[[Drop], None]


def refuse(drop: Drop) -> None:
    """The strict way to treat a drop: raise UserError."""
    raise UserError(f"{drop.where}: {drop.detail}")


def read_piece(piece: Piece, columns: Columns = DEFAULT_COLUMNS, on_drop: OnDrop = refuse) -> Iterator[Document]:
    """Documents of one piece, in order.

    Single bad documents (not UTF-8, not JSON, null text) go to `on_drop`. Raises UserError for a file that is truncated
    or damaged and for a missing column, naming file and place.
    """
    readers = {"text": _read_text, "lines": _read_lines, "table": _read_table, "hub": _read_hub}
    try:
        yield from readers[piece.kind](piece, columns, on_drop)
    except OSError as error:
        raise UserError(f"{piece.path} cannot be read: {error}") from error


def _read_text(piece: Piece, columns: Columns, on_drop: OnDrop) -> Iterator[Document]:
    data = Path(piece.path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        on_drop(Drop("not UTF-8", piece.path, f"byte {error.start} is not UTF-8 ({error.reason})"))
        return
    del data  # while the document is in use, one copy of it is enough
    if not text:
        on_drop(Drop("empty", piece.path, "the file is empty"))
        return
    yield Document(text, piece.domain or piece.default_domain, piece.source, piece.id)


def _read_lines(piece: Piece, columns: Columns, on_drop: OnDrop) -> Iterator[Document]:
    for number, (offset, line) in enumerate(_lines(piece), start=1):
        if not line.strip():
            continue
        # Inside a later stretch of a file the line's number is unknown without reading what comes before.
        where = f"{piece.path}, " + (f"line {number}" if piece.start == 0 else f"the line at byte {offset}")
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            on_drop(Drop("not UTF-8", where, f"byte {error.start} of the line is not UTF-8 ({error.reason})"))
            continue
        except (ValueError, RecursionError) as error:
            on_drop(Drop("not JSON", where, f"the line is not JSON ({error})"))
            continue
        if not isinstance(record, dict):
            on_drop(Drop("not JSON", where, f"the line is a JSON {type(record).__name__}, not an object"))
            continue
        if columns.text not in record:
            raise UserError(f"{where}: there is no field {columns.text!r}; the fields are {', '.join(sorted(record))}")
        document = _from_fields(piece, columns, record, str(offset), where, on_drop)
        if document is not None:
            yield document


def _from_fields(
    piece: Piece, columns: Columns, record: dict[str, Any], default_id: str, where: str, on_drop: OnDrop
) -> Document | None:
    text = record[columns.text]
    if not isinstance(text, str):
        detail = (
            f"the field {columns.text!r} is null" if text is None else f"{columns.text!r} is no text but {text!r:.40}"
        )
        on_drop(Drop("no text", where, detail))
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        on_drop(Drop("not UTF-8", where, "the text holds half of a surrogate pair, which UTF-8 cannot express"))
        return None
    domain, source, id = (record.get(name) for name in (columns.domain, columns.source, columns.id))
    return Document(
        text,
        piece.domain or _name(domain) or piece.default_domain,
        _name(source) or piece.source,
        default_id if id is None else _name(id),
    )


def _name(value: Any) -> str:
    """A field as a short name; what UTF-8 cannot express is replaced."""
    return "" if value is None else str(value).encode("utf-8", "replace").decode()


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(offset in the decompressed file, line) of the lines that begin inside the piece."""
    if not piece.path.endswith((".gz", ".zst")):
        yield from _plain_lines(piece)
        return
    chunks = _zstd_chunks(piece.path) if piece.path.endswith(".zst") else _gzip_chunks(piece.path)
    offset = 0
    unfinished: list[bytes] = []
    for chunk in chunks:
        *complete, rest = chunk.split(b"\n")
        for part in complete:
            line = b"".join((*unfinished, part))
            unfinished.clear()
            yield offset, line
            offset += len(line) + 1
        unfinished.append(rest)
    yield offset, b"".join(unfinished)


def _plain_lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    with Path(piece.path).open("rb") as file:
        if piece.start > 0:  # a line that began before the piece belongs to the piece before
            file.seek(piece.start - 1)
            file.readline()
        offset = file.tell()
        while offset < piece.stop:
            line = file.readline()
            if not line:
                return
            yield offset, line
            offset += len(line)


def _gzip_chunks(path: str) -> Iterator[bytes]:
    done = 0
    with gzip.open(path) as file:
        while True:
            try:
                chunk = file.read(CHUNK_BYTES)
            except EOFError:
                raise UserError(f"{path} is cut off: the gzip stream ends after {done} decompressed bytes") from None
            except (gzip.BadGzipFile, zlib.error) as error:
                raise UserError(f"{path} is not a sound gzip file after {done} decompressed bytes: {error}") from None
            if not chunk:
                return
            done += len(chunk)
            yield chunk


def _zstd_chunks(path: str) -> Iterator[bytes]:
    import zstandard

    done = 0
    inside_frame = False
    frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    with Path(path).open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            while data:
                try:
                    chunk = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise UserError(
                        f"{path} is not a sound zstd file after {done} decompressed bytes: {error}"
                    ) from None
                data = frame.unused_data if frame.eof else b""
                inside_frame = not frame.eof
                if frame.eof:  # a file may be several frames
                    frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                if chunk:
                    done += len(chunk)
                    yield chunk
    if inside_frame:
        raise UserError(f"{path} is cut off: the zstd stream ends after {done} decompressed bytes")


def open_table(path: str) -> Any:
    """A pyarrow ParquetFile; raises UserError when the file is truncated or no parquet."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a sound parquet file: {error}") from None


def _read_table(piece: Piece, columns: Columns, on_drop: OnDrop) -> Iterator[Document]:
    import pyarrow
    import pyarrow.types as types

    with open_table(piece.path) as table:
        schema = table.schema_arrow
        if columns.text not in schema.names:
            raise UserError(
                f"{piece.path}: there is no column {columns.text!r}; the columns are {', '.join(schema.names)}"
            )
        kind = schema.field(columns.text).type
        value_kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(value_kind) or types.is_large_string(value_kind) or types.is_string_view(value_kind)):
            raise UserError(f"{piece.path}: the column {columns.text!r} holds {kind}, not text")
        wanted = [name for name in (columns.text, columns.domain, columns.source, columns.id) if name in schema.names]
        row = sum(table.metadata.row_group(group).num_rows for group in range(piece.start))
        for group in range(piece.start, piece.stop):
            try:
                for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=wanted):
                    yield from _rows(piece, columns, batch, row, on_drop)
                    row += batch.num_rows
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{piece.path} is damaged in row group {group}, row {row}: {error}") from None


def _rows(piece: Piece, columns: Columns, batch: Any, first_row: int, on_drop: OnDrop) -> Iterator[Document]:
    try:
        records = batch.to_pylist()
    except UnicodeDecodeError:
        records = []
        for index in range(batch.num_rows):
            try:
                records.append(batch.slice(index, 1).to_pylist()[0])
            except UnicodeDecodeError as error:
                records.append(error)
    for row, record in enumerate(records, start=first_row):
        where = f"{piece.path}, row {row}"
        if isinstance(record, UnicodeDecodeError):
            on_drop(Drop("not UTF-8", where, f"byte {record.start} of a field is not UTF-8 ({record.reason})"))
            continue
        document = _from_fields(piece, columns, record, str(row), where, on_drop)
        if document is not None:
            yield document


def _read_hub(piece: Piece, columns: Columns, on_drop: OnDrop) -> Iterator[Document]:
    data = open_hub(piece.path)
    for row in range(piece.start, piece.stop):
        record = data[row]
        where = f"{piece.path}, row {row}"
        if columns.text not in record:
            raise UserError(
                f"{where}: there is no column {columns.text!r}; the columns are {', '.join(sorted(record))}"
            )
        document = _from_fields(piece, columns, record, str(row), where, on_drop)
        if document is not None:
            yield document


def open_hub(address: str) -> Any:
    """The data set that `hf://owner/name[/config][:split]` names, in the library's cache; split `train` if absent."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"{address} needs the package datasets: pip install 'trinity-moe[datasets]'") from None
    name, _, split = address.removeprefix("hf://").partition(":")
    parts = name.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(
            f"{address} names no data set; write hf://owner/name, hf://owner/name/config or either with :split"
        )
    try:
        return datasets.load_dataset("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split=split or "train")
    except (ValueError, OSError) as error:
        raise UserError(f"{address} cannot be loaded: {error}") from error
