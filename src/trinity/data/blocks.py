"""Files with one checksum per block, verified block by block on first use through a memory map."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from trinity.base.errors import UserError
from trinity.base.files import atomic_write

BLOCK_BYTES = 1 << 16
"""Small enough that a random read of one document checks little more than itself; 4 bytes of checksum each."""


class FileRecord(NamedTuple):
    """What a manifest says of a file."""

    file: str
    bytes: int
    checksum: str
    """crc32 of the file's table of block checksums, as eight hexadecimal digits."""


def checksum_path(path: Path) -> Path:
    """Where the little-endian uint32 table of block checksums of `path` stands."""
    return path.with_name(path.name + ".crc")


class BlockWriter:
    """Appends bytes to an open file and computes the checksums on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self.bytes = 0
        self._file = file
        self._checksums: list[int] = []
        self._running = 0

    def write(self, array: np.ndarray) -> None:
        """Append the memory of a C-contiguous array, which must already have the file's type and byte order."""
        data = array.reshape(-1).view(np.uint8)
        done = 0
        while done < data.size:
            take = min(BLOCK_BYTES - self.bytes % BLOCK_BYTES, data.size - done)
            self._running = zlib.crc32(data[done : done + take].data, self._running)
            self.bytes += take
            done += take
            if self.bytes % BLOCK_BYTES == 0:
                self._checksums.append(self._running)
                self._running = 0
        self._file.write(data.data)

    def checksums(self) -> np.ndarray:
        tail = [self._running] if self.bytes % BLOCK_BYTES else []
        return np.array(self._checksums + tail, dtype="<u4")


@contextmanager
def write_blocks(path: Path) -> Iterator[BlockWriter]:
    """Write `path` and its table of checksums; both are whole or absent, the table is there first."""
    with atomic_write(path) as file:
        writer = BlockWriter(file)
        yield writer
        with atomic_write(checksum_path(path)) as table:
            table.write(writer.checksums().tobytes())


def record_of(path: Path, root: Path) -> FileRecord:
    """The manifest's entry of a file that `write_blocks` made; the name is relative to `root`."""
    table = checksum_path(path).read_bytes()
    return FileRecord(path.relative_to(root).as_posix(), path.stat().st_size, f"{zlib.crc32(table):08x}")


class CheckedFile:
    """A memory-mapped file of one type whose blocks are verified the first time that they are used.

    Opening only compares the size; raises UserError for a missing, truncated or damaged file.
    """

    def __init__(self, root: Path, record: FileRecord, dtype: Any) -> None:
        self.path = root / record.file
        self.dtype = np.dtype(dtype)
        self._record = record
        self._map: np.ndarray | None = None
        self._verified = bytearray(-(-record.bytes // BLOCK_BYTES))
        self._all_verified = False
        self._table: np.ndarray | None = None
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            raise UserError(f"{self.path} is missing although the manifest beside it names it") from None
        if size != record.bytes:
            raise UserError(
                f"{self.path} has {size} bytes where the manifest says {record.bytes}; it was cut or changed"
            )

    def __len__(self) -> int:
        return self._record.bytes // self.dtype.itemsize

    def release(self) -> None:
        """Forget the memory map (views of it stay valid); which blocks are verified is remembered."""
        self._map = None

    def item(self, index: int) -> int:
        """One element."""
        offset = index * self.dtype.itemsize
        if not self._verified[offset // BLOCK_BYTES]:
            self._verify(offset // BLOCK_BYTES)
        return self._array().item(index)

    def view(self, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop`, a read-only view of the map."""
        if start < stop and not self._all_verified:
            first = start * self.dtype.itemsize // BLOCK_BYTES
            last = (stop * self.dtype.itemsize - 1) // BLOCK_BYTES
            # find() looks for the first block that is still 0, at memory speed.
            block = self._verified.find(0, first, last + 1)
            while block >= 0:
                self._verify(block)
                block = self._verified.find(0, block + 1, last + 1)
        return self._array()[start:stop]

    def whole(self) -> np.ndarray:
        """Every element, verified."""
        view = self.view(0, len(self))
        self._all_verified = True
        return view

    def failures(self) -> Iterator[str]:
        """One sentence for each damaged block, whether or not it was verified before."""
        for block in range(len(self._verified)):
            try:
                self._verify(block)
            except UserError as error:
                yield str(error)
                if self._table is None:  # without its table nothing of the file can be judged
                    return

    def _array(self) -> np.ndarray:
        array = self._map  # another thread may release it meanwhile
        if array is None:
            if self._record.bytes == 0:
                array = np.empty(0, self.dtype)
                array.flags.writeable = False
            else:
                # A plain array over the map: indexing np.memmap itself is several times slower.
                array = np.asarray(np.memmap(self.path, self.dtype, mode="r"))
            self._map = array
        return array

    def _verify(self, block: int) -> None:
        table = self._load_table() if self._table is None else self._table
        start = block * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, self._record.bytes)
        actual = zlib.crc32(self._array().view(np.uint8)[start:stop].data)
        expected = int(table[block])
        if actual != expected:
            raise UserError(
                f"{self.path} is damaged between byte {start} and byte {stop}: its crc32 is {actual:08x}, "
                f"expected {expected:08x}; restore the file or prepare the shards again"
            )
        self._verified[block] = 1

    def _load_table(self) -> np.ndarray:
        path = checksum_path(self.path)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{path} is missing, so {self.path.name} cannot be verified") from None
        actual = f"{zlib.crc32(data):08x}"
        if actual != self._record.checksum:
            raise UserError(f"{path} is damaged: its crc32 is {actual}, the manifest says {self._record.checksum}")
        self._table = np.frombuffer(data, dtype="<u4")
        return self._table
