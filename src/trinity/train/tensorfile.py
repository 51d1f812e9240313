"""safetensors files, streamed to disk with their checksum in one pass, and read back only when the checksum agrees."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trinity.base.errors import UserError

CHUNK = 1 << 24
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Digest(NamedTuple):
    bytes: int
    sha256: str


class HashedFile:
    """A new file written through the file descriptor, flushed to the disk on close, and hashed on the way."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._hash = hashlib.sha256()
        self._bytes = 0

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), CHUNK):
            piece = view[start : start + CHUNK]
            self._hash.update(piece)
            while piece:
                piece = piece[os.write(self._handle, piece) :]
        self._bytes += len(view)

    def finish(self) -> Digest:
        """Flush to the disk; the size and checksum of what was written."""
        os.fsync(self._handle)
        return Digest(self._bytes, self._hash.hexdigest())


def write_bytes(path: Path, data: bytes) -> Digest:
    """Write a new file whole."""
    with HashedFile(path) as file:
        file.write(data)
        return file.finish()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Digest:
    """Write CPU tensors as a new safetensors file, without a second copy in memory."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with HashedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors[name].contiguous().reshape(-1).view(torch.uint8)
            file.write(flat.numpy().data)
        return file.finish()


def digest(path: Path) -> Digest:
    """Size and checksum of a regular file; a link is refused. Raises UserError."""
    try:  # without O_NONBLOCK a pipe in place of the file would wait for a writer
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path} is not a regular file")
    with os.fdopen(handle, "rb") as file:
        found = hashlib.file_digest(file, "sha256")
        return Digest(file.tell(), found.hexdigest())


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file by name, on the CPU, one at a time.

    Raises UserError when it is not such a file and at the first tensor with numbers that are not finite: no run could
    go on from them.
    """
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no mapping)
                tensor = file.get_tensor(name)
                check_finite(path, name, tensor)
                yield name, tensor
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None


def check_finite(where: Path, name: str, tensor: Tensor) -> None:
    """Raises UserError when a tensor of a checkpoint holds NaN or infinity."""
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise UserError(f"{where}: {name} holds numbers that are not finite; take an earlier checkpoint")
