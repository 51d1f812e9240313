"""The manifest of a checkpoint, and reading JSON that a stranger may have written."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trinity.base.errors import UserError
from trinity.train.tensorfile import Digest

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
FILES = (MODEL, OPTIMIZER, STATE)
PART = re.compile(r"(model|optimizer)-(\d{5})-of-(\d{5})\.safetensors")
FORMAT = 1
MANIFEST_BYTES = 1 << 21
"""A manifest is smaller than this by far."""


def read_manifest(path: Path) -> dict[str, Digest]:
    """Sizes and checksums by file name.

    Raises UserError when it is missing or names anything but the files of a checkpoint: three, or with the tensors in
    parts one of either kind for each part.
    """
    manifest = path / MANIFEST
    if manifest.is_symlink():
        raise UserError(f"{manifest} is a link; a checkpoint holds plain files only")
    if size(manifest) > MANIFEST_BYTES:
        raise UserError(f"{manifest} has {size(manifest)} bytes, more than any manifest")
    data = read_json(manifest)
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("files"), dict):
        raise UserError(f"{manifest} is not a manifest of format {FORMAT}")
    files = data["files"]
    if sorted(files) != sorted(FILES) and not _is_in_parts(files):
        raise UserError(f"{manifest} names the files {sorted(map(str, files))}; a checkpoint has {', '.join(FILES)}")
    for name, entry in files.items():
        fields = entry if isinstance(entry, dict) else {}
        if type(fields.get("bytes")) is not int or not isinstance(fields.get("sha256"), str):
            raise UserError(f"{manifest} gives no size and checksum for {name}")
    return {name: Digest(entry["bytes"], entry["sha256"]) for name, entry in files.items()}


def part_name(kind: str, number: int, parts: int) -> str:
    """File name of part `number` (from 0) of "model" or "optimizer"."""
    return f"{kind}-{number:05d}-of-{parts:05d}.safetensors"


def tensor_files(names: Iterable[str], kind: str) -> list[str]:
    """The files among those of a manifest that hold the tensors of "model" or "optimizer"."""
    return sorted(name for name in names if name == f"{kind}.safetensors" or name.startswith(f"{kind}-"))


def _is_in_parts(names: Iterable[str]) -> bool:
    found = set(names)
    parts = {match[3] for name in found if (match := PART.fullmatch(name))}
    if len(parts) != 1:
        return False
    count = int(parts.pop())
    every = {part_name(kind, number, count) for kind in ("model", "optimizer") for number in range(count)}
    return found == every | {STATE}


def read_json(path: Path) -> Any:
    """Plain JSON of a regular file: no key twice, no NaN. Raises UserError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice[:80]!r} stands there twice")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a number of JSON")

    if not path.is_file():
        raise UserError(f"there is no file {path}" if not path.exists() else f"{path} is not a regular file")
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None


def size(path: Path) -> int:
    """Bytes of a regular file; -1 for anything else, links included."""
    return path.stat().st_size if path.is_file() and not path.is_symlink() else -1
