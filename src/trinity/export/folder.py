"""A model directory that appears whole or not at all."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trinity.base.errors import UserError
from trinity.base.files import FULL, sync_folder


def weights_fingerprint(directory: Path) -> str:
    """sha256 over the names and bytes of the safetensors files, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_replaceable(out_dir: Path, *, force: bool) -> None:
    """Only a model directory, or an empty one, may give way to another, and only with `force`. Raises UserError."""
    if not out_dir.exists():
        return
    if not force:
        raise UserError(f"{out_dir} exists already; choose another directory or pass --force to replace it")
    if not out_dir.is_dir():
        raise UserError(f"{out_dir} is a file; name a directory")
    inside = list(out_dir.iterdir())
    folders = [path for path in inside if path.is_dir()]
    if inside and (folders or not (out_dir / "config.json").exists()):
        raise UserError(
            f"{out_dir} holds {(folders or inside)[0].name}, which is no part of a model; it is not replaced"
        )


@contextmanager
def folder_aside(out_dir: Path) -> Iterator[Path]:
    """A new folder beside `out_dir` that takes its place when the block succeeds and is removed when it does not."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = out_dir.with_name(f".{out_dir.name}.partial")
    old = out_dir.with_name(f".{out_dir.name}.old")
    if old.exists() and not out_dir.exists():  # killed between the two renames below
        old.rename(out_dir)
    for leftover in (folder, old):  # of an export that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        sync_folder(folder)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise UserError(f"the disk is full: {out_dir} was not written") from error
        raise
    if out_dir.exists():
        out_dir.rename(old)
    folder.rename(out_dir)
    sync_folder(out_dir.parent)
    shutil.rmtree(old, ignore_errors=True)
