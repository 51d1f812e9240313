"""Tensors that ranks saved in parts: a file for each rank, and any part of any tensor read back from them.

Each file is plain safetensors. Where a tensor in it is a part, the file's metadata says of which whole, under the key
`parts`: JSON, `{name: [shape of the whole, start of the part]}`. No list of all parts is kept anywhere, so no rank ever
needs one.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trinity.base.errors import UserError
from trinity.parallel.slices import Slice

PARTS = "parts"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def parts_metadata(slices: Mapping[str, Slice]) -> dict[str, str]:
    """The metadata of a file with these parts."""
    if not slices:
        return {}
    parts = {name: [list(part.shape), list(part.start)] for name, part in sorted(slices.items())}
    return {PARTS: json.dumps(parts, separators=(",", ":"))}


class _Piece(NamedTuple):
    file: Path
    part: Slice


class SavedTensors:
    """The tensors of some files, whole or in parts; opens them, and reads what is asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Raises UserError for a file that is no safetensors and for parts that do not make a whole."""
        self._pieces: dict[str, list[_Piece]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self.files = list(files)
        for file in self.files:
            try:
                self._index(file)
            except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise UserError(f"{file} is not a readable safetensors file: {error}") from None
        for name, pieces in self._pieces.items():
            shapes = {piece.part.shape for piece in pieces}
            there = sum(math.prod(piece.part.size) for piece in pieces)
            if len(shapes) > 1 or there != math.prod(pieces[0].part.shape):
                where = f"{self.files[0].parent} ({len(pieces)} parts of {sorted(shapes)})"
                raise UserError(f"{name} is not whole in {where}: it is damaged")

    def _index(self, file: Path) -> None:
        with safe_open(file, framework="pt") as opened:
            parts = _parts(opened.metadata())
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                view = opened.get_slice(name)
                size, dtype = tuple(view.get_shape()), DTYPES[view.get_dtype()]
                shape, start = parts.get(name, (size, (0,) * len(size)))
                part = Slice(shape, start, size)
                if not len(shape) == len(start) == len(size) or any(
                    a < 0 or a + n > m for a, n, m in zip(start, size, shape, strict=True)
                ):
                    raise ValueError(f"{name} has a part of {size} at {start} in {shape}")
                if self._dtypes.setdefault(name, dtype) != dtype:
                    raise ValueError(f"{name} is {dtype} here and {self._dtypes[name]} elsewhere")
                self._pieces.setdefault(name, []).append(_Piece(file, part))

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    @property
    def names(self) -> list[str]:
        return list(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self._pieces[name][0].part.shape

    def read(self, name: str, part: Slice | None = None) -> Tensor:
        """A tensor or a part of it, on the CPU; holds no more in memory than that and one saved part.

        Raises UserError when the whole has another shape, or when what is read has holes (parts that overlap).
        """
        shape = self.shape(name)
        part = part or Slice(shape, (0,) * len(shape), shape)
        if part.shape != shape:
            raise UserError(f"{self.files[0].parent}: {name} is {list(shape)}, but this run has {list(part.shape)}")
        dtype = self._dtypes[name]
        # Parts that overlap leave holes of their size elsewhere, where no number may seem to stand.
        found = torch.full(part.size, math.nan if dtype.is_floating_point else 0, dtype=dtype)
        missing = found.numel()
        for piece in self._pieces[name]:
            common = piece.part.overlap(part)
            if common is None:
                continue
            with safe_open(piece.file, framework="pt") as opened:
                if not shape:
                    return opened.get_tensor(name)
                found[common.inside(part)] = opened.get_slice(name)[common.inside(piece.part)]
            missing -= math.prod(common.size)
        if missing:
            raise UserError(f"{self.files[0].parent}: parts of {name} overlap or are missing; it is damaged")
        return found


def _parts(metadata: Any) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    text = (metadata or {}).get(PARTS)
    if text is None:
        return {}
    return {str(name): (_ints(shape), _ints(start)) for name, (shape, start) in json.loads(text).items()}


def _ints(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"{values!r} is no list of integers")
    return tuple(values)
