"""Checkpoints: folders that are either whole or absent, whatever moment the process dies at.

    RUN/checkpoints/step-00000100/  model.safetensors  optimizer.safetensors  state.json  manifest.json

A checkpoint is written into a hidden folder beside its place, every file is flushed to the disk, the manifest with
sizes and checksums comes last, and one rename makes it visible. Reading checks the manifest first. Nothing is ever
unpickled, and only the names above are ever opened.

Of a sharded model every rank of one replica writes what it holds, and nothing is gathered:

    model-00000-of-00008.safetensors  optimizer-00000-of-00008.safetensors  ...  state.json  manifest.json

Each rank leaves a receipt with its checksums; the main rank waits for all of them, writes the manifest and renames.
Any number of ranks, one included, reads either form: each takes the parts that it needs (`parallel.saved`).
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trinity.base.errors import UserError
from trinity.base.files import sync_folder
from trinity.parallel.saved import SavedTensors, parts_metadata
from trinity.parallel.slices import Slice
from trinity.train.manifest import (
    FORMAT,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    part_name,
    read_json,
    read_manifest,
    size,
    tensor_files,
)
from trinity.train.tensorfile import Digest, check_finite, digest, read_tensors, write_bytes, write_tensors

NAME = re.compile(r"step-(\d{8,})")
ASIDE = re.compile(r"\.step-\d{8,}\.(partial|removed)")


@dataclass(frozen=True)
class Part:
    """Which of several parts of a checkpoint a rank writes."""

    number: int
    parts: int
    slices: Mapping[str, Slice]
    """What each sharded tensor here, of model or optimizer, is a part of; the others are whole."""
    writes: bool = True
    """Off on ranks of other replicas, which hold the same."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, on the CPU, or what one rank holds of it."""

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    """JSON: step, tokens, source, random state, guard, fingerprints, settings."""
    part: Part | None = None
    """None: everything."""
    ready: Callable[[], None] = lambda: None
    """Waits until the tensors hold their values, where a GPU may still be copying them."""


@dataclass(frozen=True)
class CheckpointInfo:
    path: Path
    step: int
    bytes: int
    """By the manifest; 0 where that is missing or unreadable."""
    complete: bool
    """Every file of the manifest is there with its size; `verify_checkpoint` also reads them."""


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[CheckpointInfo]:
    """Checkpoints in a run's `checkpoints/`, oldest first; links are not followed."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = NAME.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            try:
                files = read_manifest(path)
                complete = all(size(path / name) == entry.bytes for name, entry in files.items())
                total = sum(entry.bytes for entry in files.values())
            except UserError:
                complete, total = False, 0
            found.append(CheckpointInfo(path, int(match[1]), total, complete))
    return sorted(found, key=lambda info: info.step)


def verify_checkpoint(path: Path, share: tuple[int, int] = (0, 1)) -> dict[str, Digest]:
    """Read every file of a checkpoint against its manifest, and every number of its tensors.

    `share` (number, of how many): ranks may each read some of the files. Raises UserError that names the file and what
    differs, or the tensor that holds NaN or infinity: weights that a training gone wrong has spoilt are whole as a file
    and still nothing to go back to.
    """
    files = _verify_files(path, share)
    number, shares = share
    for name in sorted(files)[number::shares]:
        if name != STATE:
            for _ in read_tensors(path / name):
                pass
    return files


def _verify_files(path: Path, share: tuple[int, int] = (0, 1)) -> dict[str, Digest]:
    files = read_manifest(path)
    number, shares = share
    for name in sorted(files)[number::shares]:
        expected, found = files[name], digest(path / name)
        if found.bytes != expected.bytes:
            raise UserError(f"{path / name} has {found.bytes} bytes, its manifest says {expected.bytes}: it is damaged")
        if found.sha256 != expected.sha256:
            raise UserError(
                f"{path / name} has checksum {found.sha256[:16]}..., the manifest {expected.sha256[:16]}...: damaged"
            )
    return files


def load_checkpoint(path: Path, slices: Mapping[str, Slice] | None = None) -> Snapshot:
    """A checkpoint, verified unless it is read by `slices`; its tensors on the CPU.

    `slices`: of the tensors named there only that part is read; whoever reads by parts has verified together. Raises
    UserError when it is damaged or not one, is of another step than its folder's name says, or holds numbers that are
    not finite: no run could go on from them.
    """
    files = _verify_files(path) if slices is None else read_manifest(path)
    state = read_json(path / STATE)
    if not isinstance(state, dict) or type(state.get("step")) is not int:
        raise UserError(f"{path / STATE} is not the state of a checkpoint: it has no step")
    named = NAME.fullmatch(path.name)
    if named and int(named[1]) != state["step"]:
        raise UserError(f"{path / STATE} is of step {state['step']}, not of the step in its folder's name")
    model, optimizer = (_read_finite(path, tensor_files(files, kind), slices or {}) for kind in ("model", "optimizer"))
    return Snapshot(state["step"], model, optimizer, state)


def _read_finite(folder: Path, names: list[str], slices: Mapping[str, Slice]) -> dict[str, Tensor]:
    if len(names) == 1 and not slices:
        return dict(read_tensors(folder / names[0]))
    saved = SavedTensors(folder / name for name in names)
    tensors = {name: saved.read(name, slices.get(name)) for name in saved.names}
    for name, tensor in tensors.items():
        check_finite(folder, name, tensor)
    return tensors


def latest_good(
    folder: Path | Sequence[CheckpointInfo],
    on_damage: Callable[[CheckpointInfo, str], None],
    verify: Callable[[Path], object] = verify_checkpoint,
) -> Path | None:
    """The newest checkpoint of a folder, or of `list_checkpoints`, that verifies; None when there is none.

    `on_damage` is told of every newer one that is passed over, and why: going back is never silent.
    """
    for info in reversed(list_checkpoints(folder) if isinstance(folder, Path) else folder):
        try:
            verify(info.path)
        except UserError as error:
            on_damage(info, str(error))
        else:
            return info.path
    return None


def save_checkpoint(folder: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint and commit it by one rename; returns its folder.

    A whole checkpoint of the same step is left as it is; a damaged one is replaced. Raises UserError when the disk is
    full.
    """
    assert snapshot.part is None, "a part of a checkpoint is no checkpoint"
    if prepare(folder, snapshot.step):
        with abandoned_on_error(folder, snapshot.step):
            commit(folder, snapshot, write_tensor_files(folder, snapshot))
    return folder / checkpoint_name(snapshot.step)


def partial_folder(folder: Path, step: int) -> Path:
    """Where a checkpoint is written before it is whole."""
    return folder / f".{checkpoint_name(step)}.partial"


def prepare(folder: Path, step: int) -> bool:
    """Make the empty folder that a checkpoint is written into; False when a whole one of the step is there already.

    Raises UserError when it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, partial = folder / checkpoint_name(step), partial_folder(folder, step)
    if os.path.lexists(final):
        try:
            verify_checkpoint(final)
        except UserError:
            _remove(final)
        else:
            return False
    with abandoned_on_error(folder, step):
        if os.path.lexists(partial):
            shutil.rmtree(partial)
        os.mkdir(partial)  # noqa: PTH102  (all writing goes through `os`, where the tests inject faults)
    return True


def write_tensor_files(folder: Path, snapshot: Snapshot) -> dict[str, Digest]:
    """Write the tensors of a snapshot into the folder that `prepare` made; sizes and checksums by file name."""
    partial, part = partial_folder(folder, snapshot.step), snapshot.part
    snapshot.ready()
    found = {}
    for kind, whole_name, tensors in (
        ("model", MODEL, snapshot.model),
        ("optimizer", OPTIMIZER, snapshot.optimizer),
    ):
        if part is None:
            found[whole_name] = write_tensors(partial / whole_name, tensors)
            continue
        name = part_name(kind, part.number, part.parts)
        slices = {name: part.slices[name] for name in tensors if name in part.slices}
        found[name] = write_tensors(partial / name, tensors, parts_metadata(slices))
    return found


def commit(folder: Path, snapshot: Snapshot, files: Mapping[str, Digest]) -> None:
    """Add state and manifest to the tensor files, and make the checkpoint visible by one rename."""
    partial = partial_folder(folder, snapshot.step)
    state = json.dumps(snapshot.state, indent=1, ensure_ascii=False, allow_nan=False).encode()
    every = {**files, STATE: write_bytes(partial / STATE, state)}
    manifest = {"format": FORMAT, "files": {name: entry._asdict() for name, entry in every.items()}}
    write_bytes(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    sync_folder(partial)
    os.rename(partial, folder / checkpoint_name(snapshot.step))  # noqa: PTH104
    sync_folder(folder)


@contextmanager
def abandoned_on_error(folder: Path, step: int) -> Iterator[None]:
    """Removes the half-written checkpoint when the disk fails, and says so in a UserError."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(partial_folder(folder, step), ignore_errors=True)
        raise UserError(
            f"the checkpoint of step {step} could not be written to {folder}: {error.strerror or error}; "
            "earlier checkpoints are unchanged"
        ) from error


def prune(folder: Path, keep_last: int, keep_every: int) -> list[int]:
    """Remove whole checkpoints beyond the newest `keep_last`, but for multiples of `keep_every`; returns their steps.

    Damaged ones are neither counted nor removed, so at least one whole checkpoint always stays.
    """
    whole = [info for info in list_checkpoints(folder) if info.complete]
    gone = [info for info in whole[:-keep_last] if not (keep_every and info.step % keep_every == 0)]
    for info in gone:
        _remove(info.path)
    return [info.step for info in gone]


def clean_partials(folder: Path) -> list[str]:
    """Remove what a killed run left half-written or half-removed; returns the names."""
    names = [path.name for path in folder.iterdir() if ASIDE.fullmatch(path.name)] if folder.is_dir() else []
    for name in names:
        path = folder / name
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
    return names


def _remove(path: Path) -> None:
    """Take a checkpoint out of sight by one rename, then delete it; a link is removed, never followed."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    aside = path.parent / f".{path.name}.removed"
    if aside.exists():
        shutil.rmtree(aside)
    os.rename(path, aside)  # noqa: PTH104
    shutil.rmtree(aside)
