"""Files of one block: a table with what is to be said about it inside, so that one rename commits both."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trinity.base.errors import UserError
from trinity.base.files import atomic_write

ABOUT = b"trinity.curate"
_DIGITS = 6


def block_path(folder: Path, number: int) -> Path:
    return folder / f"{number:0{_DIGITS}d}.parquet"


def write_block(path: Path, columns: Mapping[str, tuple[Any, Sequence[Any]]], about: dict[str, Any]) -> None:
    """Commit a table by rename: {column: (Arrow type, values)}. Raises UserError when the disk is full."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(name, kind) for name, (kind, _) in columns.items()], {ABOUT: json.dumps(about).encode()})
    arrays = [pyarrow.array(values, kind) for kind, values in columns.values()]
    with atomic_write(path) as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), file, compression="zstd")


def read_block(path: Path, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """Columns of a block. Raises UserError when the file is damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read(columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}; remove it and run the same command again") from None
    return table.to_pydict()


def read_about(path: Path) -> dict[str, Any]:
    """What was committed with the table. Raises UserError when the file is damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}; remove it and run the same command again") from None
    if ABOUT not in metadata:
        raise UserError(f"{path} is no block of a curation")
    return json.loads(metadata[ABOUT])
